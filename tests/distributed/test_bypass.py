"""No way through a layer leaves its TopK out: Megatron's overlapped schedule of experts applies it,
and a run that loses one stops in its first step.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness import observed_pretrain
from tests.harness.launch import Run, pretrain

pytestmark = [pytest.mark.distributed]

BYPASSED = Path(__file__).with_name("bypassed.py")
BOTH = ["--topk-site", "both", "--topk-k", "8", "--topk-layers", "0-2", "--topk-mlp-k", "12"]
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def bypassed(ranks: int, *flags: str | Path, sites: str, script: str | None = None) -> Run:
    environment = {"TOPK_BYPASS": sites, **({"TOPK_SCRIPT": script} if script else {})}
    return pretrain(ranks, *flags, entry=BYPASSED, environment=environment, timeout=120)


def check_stopped(run: Run, complaint: str) -> None:
    assert run.returncode != 0
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert f"error: the TopK of the {complaint}, so the model is not the one" in errors[0]
    assert "drop it, or leave these layers out of --topk-layers" in errors[0]
    assert "[rank0]:" not in run.output
    assert "iteration        1/" not in run.output


@pytest.mark.parametrize(
    ("layout", "sites", "complaint"),
    [
        (
            "--tensor-model-parallel-size 2",
            "residual:1",
            "residual stream at layer 1 did not run in the first training step",
        ),
        (  # each rank misses layers of its own
            "--pipeline-model-parallel-size 2",
            "residual:1,MLP:0,MLP:2",
            "MLP at layers 0, 2 and the TopK of the residual stream at layer 1 did not run in the "
            "first training step",
        ),
        (  # only one of the two ranks has that layer
            f"--pipeline-model-parallel-size 2 {FULL}",
            "residual:2",
            "residual stream at layer 2 did not run in the first training step",
        ),
        (
            "--skip-train",
            "residual:0",
            "residual stream at layer 0 did not run in the first evaluation step",
        ),
    ],
    ids=["tensor-parallel", "pipeline", "pipeline-recompute", "evaluation-only"],
)
def test_a_run_that_loses_a_topk_stops_with_one_line(
    layout: str, sites: str, complaint: str, flags: list[str]
) -> None:
    few = ["--train-iters", "3"]
    check_stopped(bypassed(2, *flags, *BOTH, *few, *layout.split(), sites=sites), complaint)


def test_sampling_without_a_topk_stops_too(initial: Path) -> None:
    flags = ["--load", initial, "--prompt", "a", "--tokens", "2"]
    run = bypassed(1, *flags, sites="residual:1", script="tools/sample.py")
    check_stopped(run, "residual stream at layer 1 did not run in the first forward pass")


EXPERTS = (
    "--num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --bf16 "
    "--train-iters 3"
)


@pytest.fixture(scope="module")
def experts(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of a model with experts."""
    directory = tmp_path_factory.mktemp("experts")
    still = ["--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0", "--train-iters", "1"]
    save = ["--save", directory, "--save-interval", "1"]
    run = pretrain(2, *flags, *TOPK, *EXPERTS.split(), *still, *save)
    assert run.returncode == 0, run.output
    return directory


def train_experts(
    flags: list[str], experts: Path, more: list[str], directory: Path
) -> tuple[Run, list[dict[str, int]]]:
    """Train, check every TopK output, and return the run and the ranks' row counts."""
    directory.mkdir()
    load = ["--load", str(experts), "--finetune"]
    run = pretrain(
        2,
        *(*flags, *TOPK, *EXPERTS.split(), *load, *more),
        entry=Path(observed_pretrain.__file__),
        tensorboard=directory,
        environment={"TOPK_OBSERVED": str(directory)},
    )
    assert run.returncode == 0, run.output
    return run, [json.loads((directory / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.slow
def test_overlapped_experts_train_the_same_topk_model(
    flags: list[str], experts: Path, tmp_path: Path
) -> None:
    """Megatron's schedule runs the parts of a layer itself and never calls the layer's forward.

    It adds gradients in another order. In bfloat16 that moves a loss of 6 nats by about 1e-4 after
    a step, with and without TopK; the missing TopK of one layer moves the first loss already.
    """
    overlap = ["--overlap-moe-expert-parallel-comm"]
    plain, rows = train_experts(flags, experts, [], tmp_path / "plain")
    run, rows_overlapped = train_experts(flags, experts, overlap, tmp_path / "overlapped")
    assert run.losses()[1] == plain.losses()[1]
    assert run.losses() == pytest.approx(plain.losses(), abs=1e-3)
    assert run.scalars("grad-norm") == pytest.approx(plain.scalars("grad-norm"), rel=1e-3)
    assert rows_overlapped == rows
    assert set(rows[0]) == {"0", "1", "2"}
    for statistic in ("density", "kept_norm"):
        tag = f"topk/{statistic}/layer_01"
        assert run.scalars(tag) == pytest.approx(plain.scalars(tag), abs=1e-3)
