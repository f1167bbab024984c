"""Sparse transport and saving change no bit of a run, and a lost rank ends it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness.launch import REPOSITORY, Run, pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# k falls from 64 to 8; above 24 of 64 the messages stay dense.
ANNEAL = ["--topk-anneal", "linear", "--topk-anneal-begin", "2", "--topk-anneal-end", "12"]
PP2 = ["--pipeline-model-parallel-size", "2"]
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SPARSE = ["--topk-sparse-p2p", "--topk-sparse-save", "--topk-verify", "6"]
LAYOUTS = {
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp4-recompute": (4, f"--pipeline-model-parallel-size 4 {RECOMPUTE}"),
    "tp2-pp2-bf16-recompute": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        f"--bf16 --topk-mode abs {RECOMPUTE}",
    ),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}
# Expected counts. CROSSINGS: boundaries after a TopK layer, summed over sending ranks, times 4
# microbatches. KEPT: inputs of layers 0 to 3, each once, on every rank that has the layer, times 4
# microbatches.
CROSSINGS = {"pp2": 4, "pp4-recompute": 12, "tp2-pp2-bf16-recompute": 8, "vpp": 12}
KEPT = {"pp2": 16, "pp4-recompute": 16, "tp2-pp2-bf16-recompute": 32, "vpp": 16}


def train(ranks: int, settings: list[str], directory: Path) -> Run:
    run = pretrain(ranks, *settings, tensorboard=directory)
    assert run.returncode == 0, run.output
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_sparse_transport_and_saving_train_bitwise_like_dense(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    settings = [*flags, *TOPK, *ANNEAL, *layout.split()]
    dense = train(ranks, settings, tmp_path / "dense")
    sparse = train(ranks, [*settings, *SPARSE], tmp_path / "sparse")
    assert sorted(dense.losses()) == list(range(1, 21))
    assert sparse.losses() == dense.losses()
    assert sparse.scalars("grad-norm") == dense.scalars("grad-norm")
    assert sparse.validation_losses() == dense.validation_losses()
    # The last verified step has the final k: every boundary after a TopK layer was compared.
    verified = [line for line in sparse.output.splitlines() if "topk verify" in line]
    assert len(verified) == 4
    crossings = CROSSINGS[name]
    counts = f"{crossings} hidden states, {crossings} gradients, {KEPT[name]} saved activations"
    assert counts in verified[-1]
    assert "0 hidden states, 0 gradients, " in verified[0]  # k = H: dense


def test_sparse_saving_changes_nothing_without_recompute(
    flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    load = ["--load", str(initial), "--finetune", "--topk-sparse-save", "--topk-verify", "20"]
    run = train(1, [*flags, *TOPK, *load], tmp_path)
    assert run.losses() == single_rank.losses()
    assert run.scalars("grad-norm") == single_rank.scalars("grad-norm")
    # The outputs of the embedding and of layers 0 to 2, each kept for the norm after it, in 4
    # microbatches.
    assert "16 saved activations" in run.output


def test_ranks_with_other_settings_are_found_at_start(flags: list[str]) -> None:
    entry = Path(__file__).with_name("mismatched_pretrain.py")
    run = pretrain(2, *flags, *TOPK, *PP2, "--topk-sparse-p2p", entry=entry, timeout=120)
    assert run.returncode != 0
    assert "different TopK settings: k is 8 on rank 0 and 7 on rank 1" in run.error_line()
    assert "training ..." not in run.output or "lm loss" not in run.output


def test_rank_killed_in_mid_transfer_ends_the_others_with_a_clear_error(
    flags: list[str], tmp_path: Path
) -> None:
    # Without torchrun, which would end the other rank itself: here only the transport notices.
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    entry = str(Path(__file__).with_name("lost_rank.py"))
    command = [sys.executable, entry, *flags, *TOPK, *PP2, "--topk-sparse-p2p"]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TOPK_KILL_MESSAGE": "6"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    logs = [tmp_path / f"rank{rank}.log" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        assert ranks[1].wait(180) == -9, logs[1].read_text()
        killed = time.monotonic()
        code = ranks[0].wait(60)
    finally:
        for process in ranks:
            process.kill()
    assert code == 1, logs[0].read_text()
    assert time.monotonic() - killed < 30
    lines = [line for line in logs[0].read_text().splitlines() if line.startswith("error: ")]
    assert "rank 0: pipeline rank lost: the transfer with rank 1 did not finish" in lines[-1]
