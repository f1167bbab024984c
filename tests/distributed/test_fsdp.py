"""A checkpoint of Megatron-FSDP holds the TopK settings, and resuming compares them.

What needs a GPU is replaced by stand-ins (fsdp_pretrain.py); model, optimizer, checkpoint format
and our checks are the real ones.
"""

from pathlib import Path

import pytest

from tests.conftest import run_tool
from tests.distributed.conftest import TOPK
from tests.harness.launch import Run, pretrain
from topk_megatron.checkpoint.directory import is_complete, open_checkpoint
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.errors import USER_ERROR, CheckpointError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENTRY = Path(__file__).with_name("fsdp_pretrain.py")
FSDP = [
    *("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor", "--use-distributed-optimizer"),
    *("--data-parallel-sharding-strategy", "optim_grads_params", "--bf16"),
    # gloo has no reduction that multiplies first.
    *("--no-gradient-reduce-div-fusion", "--untie-embeddings-and-output-weights"),
    *("--lr-decay-iters", "6", "--lr-warmup-iters", "0"),
]


def train(flags: list[str], steps: int, directory: Path, *more: str | Path) -> Run:
    return pretrain(
        1,
        *(*flags, *FSDP, "--train-iters", str(steps), "--save-interval", "3", *more),
        entry=ENTRY,
        tensorboard=directory,
    )


@pytest.fixture(scope="module")
def saved(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 3 and 6 of one run."""
    directory = tmp_path_factory.mktemp("fsdp")
    run = train(flags, 6, directory / "events", *TOPK, "--save", directory / "checkpoints")
    assert run.returncode == 0, run.output
    return directory


def test_the_checkpoint_is_complete_and_holds_the_settings(saved: Path) -> None:
    load = saved / "checkpoints"
    assert is_complete(load / "iter_0000003")
    reader = open_checkpoint(load, fsdp=True)
    assert reader is not None
    assert reader.directory.name == "iter_0000006"
    assert reader.is_fsdp
    assert (reader.args.topk["k"], reader.args.topk["layers"]) == (8, [0, 1, 2])
    reader.check_objects()


def test_resuming_continues_the_uninterrupted_run(
    saved: Path, flags: list[str], tmp_path: Path
) -> None:
    load = ["--load", saved / "checkpoints", "--ckpt-step", "3", "--save", tmp_path / "new"]
    resumed = train(flags, 6, tmp_path / "events", *TOPK, *load)
    assert resumed.returncode == 0, resumed.output
    whole = Run(0, "", saved / "events").losses()
    assert resumed.losses() == {step: whole[step] for step in (4, 5, 6)}


def test_other_settings_are_refused(saved: Path, flags: list[str], tmp_path: Path) -> None:
    load = ["--load", saved / "checkpoints"]
    run = train(flags, 6, tmp_path, "--topk-k", "4", "--topk-layers", "0-2", *load)
    assert "k is 8 in the checkpoint, 4 here" in run.error_line()
    assert run.returncode != 0


def test_what_cannot_read_it_says_what_can(saved: Path, flags: list[str], tmp_path: Path) -> None:
    load = saved / "checkpoints"
    refusal = "written by Megatron-FSDP (--ckpt-format fsdp_dtensor)"
    with pytest.raises(CheckpointError, match="only a run with --use-megatron-fsdp"):
        open_checkpoint(load)
    for more in ([], ["--all-iterations"]):
        done = run_tool(
            "convert_checkpoint.py", "to-hf", "--load", load, *more, "--save", tmp_path / "hf"
        )
        assert refusal in done.stderr, done.stderr
        assert "--use-distributed-optimizer" in done.stderr
        assert done.returncode == USER_ERROR
    done = run_tool("sample.py", "--load", load, "--prompt", "a")
    assert refusal in done.stderr
    run = pretrain(1, *flags, *TOPK, "--load", load, "--train-iters", "7")
    assert refusal in run.error_line()


def test_an_overwritten_checkpoint_is_incomplete_until_it_is_whole(saved: Path) -> None:
    """The index is what torch writes last; the reader takes it for the mark of completeness."""
    directory = saved / "checkpoints" / "iter_0000003"
    assert CheckpointReader(directory).is_fsdp
    index = directory / ".metadata"
    content = index.read_bytes()
    index.unlink()
    assert not is_complete(directory)
    index.write_bytes(content[:-10])
    assert not is_complete(directory)
    index.write_bytes(content)
    assert is_complete(directory)
