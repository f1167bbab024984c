"""Sampling from checkpoints of any layout uses exactly the model that was trained."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import run_tool
from tests.distributed.conftest import TOPK
from tests.harness.launch import pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's checkpoint of a model that --use-checkpoint-args alone would not rebuild."""
    directory = tmp_path_factory.mktemp("sampled")
    layout = ["--pipeline-model-parallel-size", "2", "--qk-layernorm", "--train-iters", "10"]
    run = pretrain(2, *flags, *TOPK, *layout, "--save", directory, "--save-interval", "10")
    assert run.returncode == 0, run.output
    return directory


def sample(checkpoint: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    base = ("--load", checkpoint, "--prompt", "def main(", "--tokens", "12")
    return run_tool("sample.py", *base, *flags)


def test_equal_seeds_give_equal_text_and_others_do_not(checkpoint: Path) -> None:
    first, again, other = (sample(checkpoint, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def main(")
    assert len(first.stdout) > len("def main(\n\n")
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout


def test_the_sampled_model_has_the_norms_it_was_trained_with(checkpoint: Path) -> None:
    done = sample(checkpoint, "--temperature", "0")
    assert "qk_layernorm .................................... True" in done.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--load", "/no/such/place"], "holds no complete torch_dist checkpoint"),
        (["--iteration", "7"], "no complete checkpoint of iteration 7"),
        (["--tokenizer-model", "/no/such.model"], "/no/such.model does not exist"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
    ],
)
def test_wrong_input_is_one_line(change: list[str], complaint: str, checkpoint: Path) -> None:
    done = sample(checkpoint, *change)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
