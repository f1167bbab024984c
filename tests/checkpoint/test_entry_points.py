"""Plants pickles that run code in every file of a checkpoint, and opens it with every command."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hostile import PAYLOADS, PLACES, Touch
from tests.conftest import run_tool
from tests.harness.launch import TINY_MODEL, TINY_TRAINING, pretrain
from tests.harness.synthetic import synthetic_config, write_synthetic_checkpoint
from topk_megatron.config import TopKConfig

Plant = Callable[[Path, bytes], None]
TOPK = TopKConfig(hidden_size=32, num_layers=3, k=4, layers=(0, 1))
# Objects that only Megatron's own loader opens; the converter leaves them alone.
OPENED_BY_ALL = [name for name in PLACES if name != "another object"]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Path) -> Path:
    directory = tmp_path / "megatron"
    write_synthetic_checkpoint(directory, synthetic_config(), topk=TOPK, tokenizer_model=tokenizer)
    return directory


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", OPENED_BY_ALL)
@pytest.mark.parametrize("flags", [(), ("--all-iterations",)], ids=["one", "trajectory"])
def test_conversion_runs_nothing(
    flags: tuple[str, ...], place: str, payload: str, checkpoint: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    PLACES[place](checkpoint / "iter_0000010", PAYLOADS[payload](marker))
    done = run_tool(
        "convert_checkpoint.py", "to-hf", "--load", checkpoint, "--save", tmp_path / "hf", *flags
    )
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "hf").exists()


def test_a_hostile_checkpoint_is_not_skipped_like_a_damaged_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The command must not silently open an earlier, whole checkpoint instead."""
    write_synthetic_checkpoint(checkpoint, synthetic_config(), topk=TOPK, iteration=20)
    PLACES["index"](checkpoint / "iter_0000020", PAYLOADS["call"](tmp_path / "ran"))
    done = run_tool(
        "convert_checkpoint.py", "to-hf", "--load", checkpoint, "--save", tmp_path / "hf"
    )
    assert done.returncode == 2
    assert f"names {os.system.__module__}.system" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def trained(
    dataset: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A checkpoint from the real training loop, and the flags that resume it."""
    directory = tmp_path_factory.mktemp("trained")
    cache = tmp_path_factory.mktemp("cache")
    flags = [
        *(*TINY_MODEL, *TINY_TRAINING, "--topk-k", "8", "--num-workers", "0"),
        *("--data-path", str(dataset), "--data-cache-path", str(cache), "--train-iters", "2"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)),
    ]
    run = pretrain(1, *flags, "--save", directory, "--save-interval", "2")
    assert run.returncode == 0, run.output
    return directory, flags


@pytest.fixture
def hostile(
    place: str, payload: str, trained: tuple[Path, list[str]], tmp_path: Path
) -> tuple[Path, Path]:
    """A copy of the checkpoint with a planted payload, and the file that it would create."""
    directory, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(trained[0], directory)
    PLACES[place](directory / "iter_0000002", PAYLOADS[payload](marker))
    return directory, marker


PLANTED = [(place, "call") for place in PLACES] + [("common state", "module gadget")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("place", "payload"), PLANTED)
def test_resuming_runs_nothing(trained: tuple[Path, list[str]], hostile: tuple[Path, Path]) -> None:
    directory, marker = hostile
    run = pretrain(2, *trained[1], "--load", directory)
    assert not marker.exists()
    assert run.returncode != 0
    assert "it was not opened" in run.output or "is damaged" in run.output
    assert "iteration        3" not in run.output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("place", "payload"), PLANTED)
def test_sampling_runs_nothing(hostile: tuple[Path, Path]) -> None:
    directory, marker = hostile
    done = run_tool("sample.py", "--load", directory, "--prompt", "a", "--tokens", "2")
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_trusted_checkpoint_is_opened_when_the_user_says_so(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Also shows that code planted next to the arguments does run where it is opened."""
    directory, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(trained[0], directory)
    PLACES["another object"](directory / "iter_0000002", PAYLOADS["call"](marker))
    refused = run_tool("sample.py", "--load", directory, "--prompt", "a", "--tokens", "2")
    assert "--topk-trust-checkpoint if you trust" in refused.stderr
    flags = ["--load", directory, "--topk-trust-checkpoint", "--train-iters", "3"]
    flags += ["--override-opt_param-scheduler"]
    pretrain(1, *trained[1], *flags)
    assert marker.exists()


def test_evaluation_runs_nothing_but_the_folders_own_code(checkpoint: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "hf", tmp_path / "ran"
    done = run_tool("convert_checkpoint.py", "to-hf", "--load", checkpoint, "--save", folder)
    assert done.returncode == 0, done.stderr
    (tmp_path / "text.txt").write_text("A text to be read.\n")
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "model.safetensors"):
        torch.save(Touch(marker), folder / name)
    (folder / "tokenizer.model").rename(folder / "kept")
    torch.save(Touch(marker), folder / "tokenizer.model")
    flags = ("--model", folder, "--text", tmp_path / "text.txt")
    done = run_tool("evaluate.py", *flags)
    assert done.returncode == 2, done.stderr
    (folder / "model.safetensors").unlink()
    done = run_tool("evaluate.py", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not marker.exists()
