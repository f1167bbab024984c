"""Training steps on GPUs: Megatron's layers, Transformer Engine's, fp8, and NCCL between two."""

import re
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import TOPK
from tests.gpu.conftest import need_gpus
from tests.harness.launch import Run, pretrain
from topk_megatron.compat.accelerators import find_accelerators

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WATCHED = Path(__file__).with_name("watched_pretrain.py")
# fp8 requires dimensions divisible by 16, which the tiny model has.
FEW = ["--train-iters", "5", "--bf16", "--attention-backend", "unfused"]
SPARSE = ["--topk-sparse-p2p", "--topk-sparse-save", "--topk-verify", "2"]


def need_transformer_engine() -> None:
    found = find_accelerators()
    if found.transformer_engine is None:
        pytest.skip(f"needs Transformer Engine ({found.broken or 'not installed'})")


def train(ranks: int, *flags: str, directory: Path, entry: Path | None = None) -> Run:
    run = pretrain(ranks, *flags, tensorboard=directory, entry=entry, timeout=500)
    assert run.returncode == 0, run.output
    assert max(run.losses()) == 5
    return run


def check_watched(run: Run) -> None:
    """Check that every TopK output is bfloat16 and has at most k = 8 non-zero neurons."""
    seen = re.findall(r"WATCHED layer (\d) torch\.(\w+) at most (\d+)", run.output)
    assert {layer for layer, _, _ in seen} == {"0", "1", "2"}
    assert {dtype for _, dtype, _ in seen} == {"bfloat16"}
    assert max(int(most) for _, _, most in seen) == 8


@pytest.mark.parametrize(
    ("implementation", "backend"),
    [("local", "unfused"), ("local", "auto"), ("transformer_engine", "unfused")],
)
def test_trains_in_bfloat16(
    implementation: str, backend: str, flags: list[str], tmp_path: Path
) -> None:
    if implementation == "transformer_engine":
        need_transformer_engine()
    choice = ["--transformer-impl", implementation, "--attention-backend", backend]
    run = train(1, *flags, *TOPK, *FEW, *choice, directory=tmp_path, entry=WATCHED)
    check_watched(run)


def test_fp8_stays_inside_the_layer_and_topk_is_in_bfloat16(
    flags: list[str], tmp_path: Path
) -> None:
    need_transformer_engine()
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9 (Ada, Hopper) or newer")
    fp8 = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
    plain = train(1, *flags, *TOPK, *FEW, directory=tmp_path / "bf16")
    run = train(1, *flags, *TOPK, *FEW, *fp8, directory=tmp_path / "fp8", entry=WATCHED)
    check_watched(run)
    assert run.losses()[5] == pytest.approx(plain.losses()[5], rel=0.05)
    assert run.losses() != plain.losses()  # fp8 did run


def test_gpu_and_cpu_train_alike(flags: list[str], tmp_path: Path) -> None:
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    save = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]
    save += ["--save", str(tmp_path / "initial"), "--save-interval", "1"]
    initial = pretrain(1, *flags, *TOPK, *save, environment=no_gpu)
    assert initial.returncode == 0, initial.output
    load = ["--load", str(tmp_path / "initial"), "--finetune", "--train-iters", "5"]
    local = ["--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
    gpu = train(1, *flags, *TOPK, *load, *local, directory=tmp_path / "gpu")
    cpu = pretrain(1, *flags, *TOPK, *load, tensorboard=tmp_path / "cpu", environment=no_gpu)
    assert cpu.returncode == 0, cpu.output
    for iteration, loss in cpu.losses().items():
        assert gpu.losses()[iteration] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    "layout",
    ["--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"],
)
def test_two_gpus_over_nccl_with_sparse_transport_and_saving(
    layout: str, flags: list[str], tmp_path: Path
) -> None:
    need_gpus(2)
    settings = [*flags, *TOPK, *FEW, *layout.split()]
    sparse = SPARSE if "pipeline" in layout else SPARSE[1:]
    dense = train(2, *settings, directory=tmp_path / "dense")
    run = train(2, *settings, *sparse, directory=tmp_path / "sparse")
    assert run.losses() == dense.losses()
