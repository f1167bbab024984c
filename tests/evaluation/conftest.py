"""Two exported folders with random weights: a TopK model and a dense one."""

from pathlib import Path

import pytest

from tests.hf.models import make_folder


@pytest.fixture(scope="session")
def folders(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family."""
    directory = tmp_path_factory.mktemp("models")
    return {f: make_folder(directory / f, tokenizer, f) for f in ("default", "dense")}
