"""Every parallel layout trains the same model as one rank.

Tolerance: the losses of 20 steps, about 6 nats, agree to 2e-5 nats. Layouts add the same float32
numbers in a different order, which costs a few units in the last place per step. A larger
difference would mean that a TopK selection, a gradient or a microbatch is missing. Recomputation
does not change the order of addition, and must agree bitwise.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness import observed_pretrain
from tests.harness.launch import Run, pretrain
from topk_megatron.ops import extension

TOLERANCE = 2e-5
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sequence-parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2-distributed-optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
RECOMPUTE = {
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
}
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def train(
    ranks: int, flags: list[str], initial: Path, layout: str, directory: Path
) -> tuple[Run, list[dict[str, int]]]:
    """Train for 20 steps, check every TopK output, and return the run and the ranks' row counts."""
    run = pretrain(
        ranks,
        *flags,
        *TOPK,
        *("--load", initial, "--finetune"),
        *layout.split(),
        entry=Path(observed_pretrain.__file__),
        tensorboard=directory / "tensorboard",
        environment={"TOPK_OBSERVED": str(directory)},
    )
    assert run.returncode == 0, run.output
    return run, [json.loads((directory / f"rank{r}.json").read_text()) for r in range(ranks)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_same_model_as_one_rank(
    name: str, flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    run, rows = train(ranks, flags, initial, layout, tmp_path)
    assert run.losses().keys() == single_rank.losses().keys()
    for step, loss in single_rank.losses().items():
        assert run.losses()[step] == pytest.approx(loss, abs=TOLERANCE), f"step {step}"
    # Each of the layers 0, 1 and 2 was seen on some rank, and no other layer was.
    assert set().union(*rows) == {"0", "1", "2"}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_changes_nothing_bitwise(
    name: str, flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    run, _ = train(1, flags, initial, RECOMPUTE[name], tmp_path)
    assert run.losses() == single_rank.losses()


def test_fused_operator_trains_bitwise_like_its_definition(
    flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    assert extension.MISSING["cpu"] is None, "the CPU kernel was not built"
    load = ["--load", str(initial), "--finetune"]
    entry = Path(__file__).with_name("reference_pretrain.py")
    run = pretrain(1, *flags, *TOPK, *load, entry=entry, tensorboard=tmp_path)
    assert run.returncode == 0, run.output
    assert run.losses() == single_rank.losses()
    assert run.scalars("grad-norm") == single_rank.scalars("grad-norm")


@pytest.fixture(scope="module")
def one_neuron_per_token(
    flags: list[str], initial: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """One rank with k = 1 and a window of one step, so that some neurons are silent."""
    directory = tmp_path_factory.mktemp("sparse")
    run = pretrain(1, *flags, *SPARSE, "--load", initial, tensorboard=directory)
    assert run.returncode == 0, run.output
    shares = run.scalars("topk/silent/layer_02").values()
    assert any(0 < share < 1 for share in shares), "the comparison would be trivial"
    return run


SPARSE = [
    "--topk-k",
    "1",
    "--topk-layers",
    "0-2",
    "--finetune",
    "--train-iters",
    "4",
    "--topk-silent-tokens",
    "512",
]


@pytest.mark.parametrize("name", ["tp2-pp2", "vpp", "dp2-distributed-optimizer", "full"])
def test_layer_statistics_are_those_of_one_rank(
    name: str, flags: list[str], initial: Path, one_neuron_per_token: Run, tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name] if name in LAYOUTS else (1, RECOMPUTE[name])
    load = ["--load", str(initial), *layout.split()]
    run = pretrain(ranks, *flags, *SPARSE, *load, tensorboard=tmp_path)
    assert run.returncode == 0, run.output
    for layer in (0, 1, 2):
        for statistic in ("density", "kept_norm", "silent"):
            tag = f"topk/{statistic}/layer_{layer:02d}"
            expected = one_neuron_per_token.scalars(tag)
            assert run.scalars(tag) == pytest.approx(expected, abs=1e-4), tag
        assert set(run.scalars(f"topk/density/layer_{layer:02d}").values()) == {1 / 64}


def test_bfloat16_trains(flags: list[str], initial: Path, single_rank: Run, tmp_path: Path) -> None:
    run, _ = train(1, flags, initial, "--bf16", tmp_path)
    # bfloat16 keeps 8 bits: the losses of 20 steps stay within one percent of float32's.
    assert run.losses() == pytest.approx(single_rank.losses(), rel=1e-2)


def test_mixture_of_experts_has_its_topk(flags: list[str], tmp_path: Path) -> None:
    run = pretrain(
        2,
        *flags,
        *TOPK,
        *["--num-experts", "4", "--expert-model-parallel-size", "2", "--train-iters", "3"],
        entry=Path(observed_pretrain.__file__),
        environment={"TOPK_OBSERVED": str(tmp_path)},
    )
    assert run.returncode == 0, run.output
    rows = json.loads((tmp_path / "rank0.json").read_text())
    assert set(rows) == {"0", "1", "2"}
