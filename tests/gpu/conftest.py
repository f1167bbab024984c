"""Checks that only a GPU can make. Elsewhere every test here is skipped, with the reason."""

from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import flags as _flags
from topk_megatron.ops.extension import MISSING

flags = _flags
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def start_with_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ranks with torchrun, because a process that has touched CUDA cannot be forked."""
    monkeypatch.setenv("TOPK_TORCHRUN", "1")


@pytest.fixture
def kernels() -> None:
    """Fail, instead of skipping, without the extension: a GPU machine should have it."""
    assert MISSING["cuda"] is None, f"no CUDA kernel: {MISSING['cuda']}; run make setup"


def need_gpus(count: int) -> None:
    """Skip where there are fewer GPUs."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, and there are {torch.cuda.device_count()}")
