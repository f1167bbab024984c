"""A source whose neurons fire as a test wants, and tools/analyze.py called in this process."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness.launch import REPOSITORY
from topk_megatron.analysis.corpus import Corpus
from topk_megatron.hf.model import OpenModel


class PlantedSource:
    """Neurons of one layer as a function of the tokens; the model is only named.

    `rule(tokens [T])` returns values float32 [T, K] and neurons [T, K]; value 0 is not active.
    """

    kind = "topk"
    mode = "value"
    sae: dict[str, Any] | None = None

    def __init__(self, folder: OpenModel, width: int, rule: Callable[[np.ndarray], Any]) -> None:
        self.folder, self.width, self.rule = folder, width, rule
        self.layers: tuple[int, ...] = (0,)
        self.k = rule(np.zeros(1, np.int64))[0].shape[1]

    def states(self, tokens_BS: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        values, neurons = self.rule(tokens_BS.flatten().numpy())
        return {0: (torch.from_numpy(values), torch.from_numpy(neurons))}


def make_corpus(documents: list[np.ndarray]) -> Corpus:
    starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return Corpus("planted", "text", np.concatenate(documents).astype(np.int32), starts)


def analyze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Run tools/analyze.py; returns exit code, standard output and standard error."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import analyze as tool  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            tool.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return code, out.getvalue(), err.getvalue()


def assert_one_error(result: tuple[int, str, str], reason: str) -> None:
    """Check what every bad input leads to: exit code 2 and one line with the reason."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert reason in lines[0]
    assert "Traceback" not in err


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file of a run except speed.json, by relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "speed.json"
    }
