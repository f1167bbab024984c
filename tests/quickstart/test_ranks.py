"""The quickstart starts as many ranks as the machine can run."""

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.launch import REPOSITORY


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; its name and its neighbours' are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "quickstart"))
    names = ("run", "plays", "report")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield importlib.import_module("run")
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize(
    ("gpus", "ranks", "where"),
    [
        (0, "2", "2 data-parallel ranks"),
        (1, "1", "the GPU"),
        (2, "2", "2 data-parallel ranks"),
        (8, "2", "2 data-parallel ranks"),
    ],
)
def test_one_gpu_gets_one_rank(
    gpus: int,
    ranks: str,
    where: str,
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(quickstart, "run", lambda command, log: commands.append(command))
    args = Namespace(directory=tmp_path, steps=300)
    quickstart.train(args, "topk", "--topk-k 32", tmp_path / "plays", tmp_path / "tokenizer.model")
    (command,) = commands
    assert command[command.index("--nproc-per-node") + 1] == ranks
    assert f"training the topk model: 300 steps on {where}" in capsys.readouterr().out
    # The batch divides over one rank as over two.
    assert command[command.index("--global-batch-size") + 1] == "8"
    assert command[command.index("--micro-batch-size") + 1] == "4"
