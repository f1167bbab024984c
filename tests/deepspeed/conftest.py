"""Fixtures for the tests of examples/deepspeed: the example's modules, a model and data."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.watched_train import EXAMPLE
from tests.harness.launch import REPOSITORY
from tests.hf.models import make_folder

STEPS, LENGTH = 5, 48


@pytest.fixture(scope="session")
def example() -> Iterator[Any]:
    """The example's module `train`, imported as from its own folder."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("train")
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="session")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK LM with random weights, as tools/convert_checkpoint.py to-hf writes it."""
    return make_folder(tmp_path_factory.mktemp("model") / "hf", tokenizer)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of both kinds, built from the paragraphs of the licence."""
    directory = tmp_path_factory.mktemp("data")
    paragraphs = [
        " ".join(part.split())
        for part in (REPOSITORY / "LICENSE").read_text().split("\n\n")
        if len(part) > 80
    ]
    texts = [{"text": paragraph} for paragraph in paragraphs]
    pairs = [{"prompt": p[:30], "completion": p[30 : 60 + 3 * n]} for n, p in enumerate(paragraphs)]
    files = {"text": directory / "text.jsonl", "pairs": directory / "pairs.jsonl"}
    for name, lines in (("text", texts), ("pairs", pairs)):
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def flags(folder: Path, data: Path, config: str, save: Path, *more: str) -> list[str]:
    names = ["--model", str(folder), "--data", str(data), "--save", str(save)]
    sizes = ["--steps", str(STEPS), "--seq-length", str(LENGTH), "--lr", "1e-3", "--warmup", "2"]
    return [*names, *sizes, "--config", str(EXAMPLE / f"{config}.json"), *more]
