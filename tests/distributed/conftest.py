"""A tiny model on real text, and the initial weights from which every layout starts."""

from pathlib import Path

import pytest

from tests.harness.launch import TINY_MODEL, TINY_TRAINING, Run, pretrain

TOPK = ["--topk-k", "8", "--topk-layers", "0-2"]


@pytest.fixture(scope="session")
def flags(dataset: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the model, the data and the training; tests add the layout."""
    cache = tmp_path_factory.mktemp("index-cache")
    data = ["--data-path", str(dataset), "--data-cache-path", str(cache), "--num-workers", "0"]
    text = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    return [*TINY_MODEL, *TINY_TRAINING, *data, *text]


@pytest.fixture(scope="session")
def initial(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of untrained weights, initialised by one rank.

    Megatron draws different initial weights for different layouts (each pipeline stage has its own
    seed), so layouts are comparable only from a common checkpoint. One step at learning rate 0
    changes no weight.
    """
    directory = tmp_path_factory.mktemp("initial")
    still = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"]
    run = pretrain(1, *flags, *TOPK, *still, "--save", directory, "--save-interval", "1")
    assert run.returncode == 0, run.output
    return directory


@pytest.fixture(scope="session")
def single_rank(flags: list[str], initial: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps of one rank, with which every layout is compared."""
    run = pretrain(
        1,
        *flags,
        *TOPK,
        *("--load", initial, "--finetune"),
        tensorboard=tmp_path_factory.mktemp("single"),
    )
    assert run.returncode == 0, run.output
    return run
