"""torch.compile traces k as a symbol, so that annealing does not compile at every step."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from tests.rows import as_bits
from topk_megatron.config import TopKConfig
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.ops import pack_sparse, topk_mask, topk_mask_with_bits, unpack_sparse

WIDTH = 64
ANNEALED = [round(WIDTH - (WIDTH - 8) * step / 19) for step in range(20)]
# The first k is compiled as a constant, and the second as a symbol.
COMPILATIONS = 2


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Forget compiled graphs: those on disk hold the guards of earlier code."""
    torch._dynamo.reset()
    with fresh_cache():
        yield


def masked(x: torch.Tensor, k: int) -> torch.Tensor:
    return topk_mask(x * 2, k) * 3


def with_bits(x: torch.Tensor, k: int) -> torch.Tensor:
    y, bits = topk_mask_with_bits(x * 2, k, mode="abs")
    return y * 3 + bits.sum() * 0


def packed(x: torch.Tensor, k: int) -> torch.Tensor:
    y, bits = topk_mask_with_bits(x * 2, k)
    values, indices = pack_sparse(y, bits, k)
    return unpack_sparse(values * 3, indices, x.shape[-1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("block", [masked, with_bits, packed], ids=lambda block: block.__name__)
def test_annealing_k_compiles_at_most_twice(
    block: Callable[[torch.Tensor, int], torch.Tensor], backend: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for step, k in enumerate(ANNEALED):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, WIDTH, generator=generator, requires_grad=True)
        dy = torch.randn(5, WIDTH, generator=generator)
        got, wanted = compiled(x, k), block(x, k)
        assert torch.equal(as_bits(got), as_bits(wanted))
        dx = torch.autograd.grad(got, x, dy)[0]
        assert torch.equal(as_bits(dx), as_bits(torch.autograd.grad(wanted, x, dy)[0]))
    assert counter.frame_count <= COMPILATIONS


def test_a_compiled_layer_follows_the_k_of_the_step() -> None:
    config = TopKConfig(
        k=8,
        layers=(0,),
        num_layers=2,
        hidden_size=WIDTH,
        anneal="linear",
        anneal_start_k=WIDTH,
        anneal_end=20,
    )
    runtime = TopKRuntime(config, probing=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: runtime.apply(x, 0, training=True), backend=counter)
    seen = []
    for step in range(21):
        runtime.begin_step(step)
        x = torch.randn(3, WIDTH)
        assert torch.equal(compiled(x), topk_mask(x, runtime.k))
        seen.append(runtime.k)
    assert (seen[0], seen[-1]) == (WIDTH, 8)
    assert counter.frame_count <= COMPILATIONS


def test_one_exported_program_serves_every_k() -> None:
    exported = torch.export.export(
        _Packed(), (torch.randn(3, 100), 7), dynamic_shapes=(None, torch.export.Dim.DYNAMIC)
    )
    for k in (5, 60):
        x = torch.randn(3, 100)
        values, indices = exported.module()(x, k)
        wanted = pack_sparse(*topk_mask_with_bits(x, k), k)
        assert torch.equal(values, wanted[0])
        assert torch.equal(indices, wanted[1])


class _Packed(torch.nn.Module):
    def forward(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_sparse(*topk_mask_with_bits(x, k), k)
