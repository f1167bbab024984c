"""Every test that takes `isa` runs on each instruction set that this CPU has."""

from collections.abc import Iterator

import pytest
import torch

from topk_megatron.ops.extension import MISSING

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture
def kernels() -> None:
    """Skip where the CPU library is not built, because these tests are not about the reference."""
    if MISSING["cpu"] is not None:
        pytest.skip(f"no CPU kernel: {MISSING['cpu']}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, kernels: None) -> Iterator[str]:
    """Run the kernel on one instruction set."""
    set_isa = torch.ops.topk_megatron_internal.set_isa
    number, best = ISAS.index(request.param), set_isa(-1)
    if number > best:
        pytest.skip(f"this CPU or build has no {request.param}")
    set_isa(number)
    yield request.param
    set_isa(-1)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
