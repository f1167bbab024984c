"""Models that several tests plan."""

from collections.abc import Callable

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.plan.command_lines import read_flags, shape_of
from topk_megatron.plan.shape import Shape

LADDER = {"10m": 10e6, "100m": 100e6, "1b": 1e9, "7b": 7e9, "70b": 70e9, "500b": 500e9}
SMALL = [
    *("--num-layers", "8", "--hidden-size", "64", "--num-attention-heads", "8"),
    *("--seq-length", "32", "--vocab-size", "1000", "--max-position-embeddings", "32"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--hidden-dropout", "0", "--topk-k", "4"),
    *("--micro-batch-size", "2", "--global-batch-size", "64"),
]


def config_flags(name: str) -> list[str]:
    """Return the words of a file in configs/."""
    return read_flags(REPOSITORY / "configs" / f"{name}.args")


@pytest.fixture(scope="session")
def small() -> Callable[..., Shape]:
    """Return a function that makes a small model with further flags."""
    return lambda *more: shape_of([*SMALL, *more])
