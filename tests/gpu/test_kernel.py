"""The CUDA kernel equals the definition on a real device; tests/cuda emulates the rest."""

import pytest
import torch

from tests.rows import KINDS, MODES, as_bits, make_rows
from topk_megatron.ops import pack_sparse, topk_mask, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_the_definitions_bit_for_bit(kind: str, dtype: torch.dtype, mode: str) -> None:
    for width in (7, 64, 768, 1000, 2048, 3072, 8192, 12288, 40000):
        x = make_rows(kind, (17, width), dtype)
        for k in {1, max(1, width // 16), max(1, width - 1)}:
            y, bits = topk_mask_with_bits(x.cuda(), k, mode=mode)
            wanted, wanted_bits = topk_mask_reference(x, k, mode)
            assert torch.equal(as_bits(y.cpu()), as_bits(wanted)), (width, k)
            assert torch.equal(bits.cpu(), wanted_bits), (width, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_dy_on_the_selection(dtype: torch.dtype) -> None:
    x = make_rows("zeros_of_both_signs", (64, 768), dtype)
    dy = make_rows("normal", (64, 768), dtype, seed=1)
    on_cpu, on_gpu = (x.to(device).requires_grad_() for device in ("cpu", "cuda"))
    (wanted,) = torch.autograd.grad(topk_mask(on_cpu, 48), on_cpu, dy)
    (got,) = torch.autograd.grad(topk_mask(on_gpu, 48), on_gpu, dy.cuda())
    assert torch.equal(as_bits(got.cpu()), as_bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    for width in (7, 64, 250, 768, 1000, 4096, 12288, 40000):
        x = make_rows("random_bits", (17, width), dtype)
        for k in {1, max(1, width // 16), width}:
            bits = topk_mask_reference(make_rows("normal", (17, width), dtype), k, "value")[1]
            values, indices = pack_sparse(x.cuda(), bits.cuda(), k)
            wanted_values, wanted_indices = pack_sparse(x, bits, k)
            assert torch.equal(indices.cpu(), wanted_indices), (width, k)
            assert torch.equal(as_bits(values.cpu()), as_bits(wanted_values)), (width, k)
            dense = unpack_sparse(values, indices, width)
            kept = unpack_bits(bits, width)
            assert torch.equal(as_bits(dense.cpu()), torch.where(kept, as_bits(x), 0)), (width, k)
            assert torch.equal(OPS.count_bits(bits.cuda(), width).cpu(), kept.sum(0)), (width, k)


def test_more_elements_than_an_int32_counts() -> None:
    rows, width = 1_100_000, 2048
    if torch.cuda.mem_get_info()[0] < 4 * 2 * rows * width:
        pytest.skip("needs 18 GB of free GPU memory")
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    y = topk_mask(x, 128)
    for part in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        wanted = topk_mask_reference(x[part].cpu(), 128, "value")[0]
        assert torch.equal(as_bits(y[part].cpu()), as_bits(wanted))


def test_runs_on_the_current_stream_and_in_a_cuda_graph() -> None:
    x = torch.randn(256, 2048, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        topk_mask(x, 128)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = topk_mask(x, 128)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        graph.replay()
        assert torch.equal(y.cpu(), topk_mask_reference(x.cpu(), 128, "value")[0])


def test_compiled_by_inductor_it_is_the_same() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return topk_mask(x * 2, 128) + 1

    x = torch.randn(64, 2048, device="cuda")
    assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))


def test_the_same_on_every_run() -> None:
    x = make_rows("few_distinct", (512, 4096), torch.bfloat16).cuda()
    first = topk_mask(x, 256)
    for _ in range(20):
        assert torch.equal(topk_mask(x, 256), first)
