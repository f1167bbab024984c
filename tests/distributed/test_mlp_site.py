"""TopK inside the MLP follows docs/mlp.md on every kind of MLP and in every layout.

Tolerance of losses: 2e-5 nats, for the reason given in test_layouts.py. Selections are compared
bitwise.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness.launch import Run, pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 2e-5
BOTH = ["--topk-site", "both", "--topk-k", "8", "--topk-layers", "0-2", "--topk-mlp-k", "12"]
TP2 = ["--tensor-model-parallel-size", "2"]
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def test_every_kind_of_mlp_follows_the_formula(flags: list[str], tmp_path: Path) -> None:
    entry = Path(__file__).with_name("mlp_sites.py")
    run = pretrain(2, *flags, *TP2, entry=entry, environment={"TOPK_REPORT": str(tmp_path)})
    assert run.returncode == 0, run.output
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(report) == 32
        for name, case in report.items():
            assert case["selection_equal"], name
            assert case["output_error"] < 1e-4, (name, case)
            # 10 tokens, 6 candidates of 4 bytes each; groups need no exchange.
            assert case["exchanged_bytes"] == (0 if "groups=2" in name else 10 * 6 * 4), name


def train(ranks: int, flags: list[str], initial: Path, layout: list[str], directory: Path) -> Run:
    load = ["--load", str(initial), "--finetune"]
    run = pretrain(ranks, *flags, *BOTH, *load, *layout, tensorboard=directory)
    assert run.returncode == 0, run.output
    return run


@pytest.mark.parametrize("groups", [[], ["--topk-mlp-groups", "4"]], ids=["global", "groups"])
def test_tensor_parallel_ranks_train_the_same_model_as_one(
    groups: list[str], flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    one = train(1, flags, initial, groups, tmp_path / "one")
    split = [*groups, *TP2, "--sequence-parallel", *RECOMPUTE.split()]
    two = train(2, flags, initial, split, tmp_path / "two")
    assert two.losses() == pytest.approx(one.losses(), abs=TOLERANCE)
    assert one.losses() != single_rank.losses()  # the MLP's TopK has an effect


def test_experts_have_their_topk(flags: list[str], tmp_path: Path) -> None:
    experts = "--num-experts 4 --expert-model-parallel-size 2 --train-iters 3"
    run = pretrain(2, *flags, *BOTH, *experts.split(), tensorboard=tmp_path / "both")
    assert run.returncode == 0, run.output
    assert "MLP k 12 (value, over all units)" in run.output
    stream = [*TOPK, *experts.split()]
    residual = pretrain(2, *flags, *stream, tensorboard=tmp_path / "residual")
    assert run.losses() != residual.losses()
