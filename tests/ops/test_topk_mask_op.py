"""`topk_mask` as a torch op: gradients, tracing, recompute, shapes, on whatever is built here."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.rows import DTYPES, MODES, as_bits, make_rows
from topk_megatron.ops import TopKArgumentError, topk_mask, topk_mask_with_bits
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

OPS = torch.ops.topk_megatron


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_dy_on_the_selection(dtype: torch.dtype, mode: str) -> None:
    x = make_rows("zeros_of_both_signs", (2, 3 * 100), dtype).view(2, 3, 100).requires_grad_()
    dy = make_rows("normal", (2, 300), dtype, seed=1).view(2, 3, 100)
    y, bits = topk_mask_with_bits(x, 40, mode=mode)
    (dx,) = torch.autograd.grad(y, x, dy)
    mask = unpack_bits(topk_mask_reference(x.detach(), 40, mode)[1], 100)
    assert torch.equal(unpack_bits(bits, 100), mask)
    assert torch.equal(as_bits(dx), as_bits(dy) * mask)


def test_gradient_of_a_kept_zero_is_not_lost() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    topk_mask(x, 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_in_float64(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: topk_mask(v, 7, mode=mode), (x,))
    assert torch.autograd.gradgradcheck(lambda v: topk_mask(v, 7, mode=mode) ** 3, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for x in (torch.randn(3, 100).to(dtype), torch.randn(100, 3).to(dtype).t(), torch.empty(0, 9)):
        _, bits = OPS.topk_mask(x, 7, "value")
        torch.library.opcheck(OPS.topk_mask, (x.clone().requires_grad_(), 7, "abs"))
        torch.library.opcheck(OPS.topk_mask_backward, (x.clone().requires_grad_(), bits))
        torch.library.opcheck(OPS.bits_to_indices, (bits, x.shape[-1], 7))
        torch.library.opcheck(OPS.count_bits, (bits, x.shape[-1]))
        indices = OPS.bits_to_indices(bits, x.shape[-1], 7)
        torch.library.opcheck(OPS.gather_row, (x.clone().requires_grad_(), indices))
        values = torch.randn(indices.shape, requires_grad=True)
        torch.library.opcheck(OPS.scatter_row, (values, indices, x.shape[-1]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        y, bits = topk_mask_with_bits(x * 2, 5)
        return (topk_mask(y, 3, mode="abs") * 3).sum() + bits.sum() * 0

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (4, 7):
        x = torch.randn(num_rows, 64, requires_grad=True)
        torch.testing.assert_close(compiled(x), loss(x), rtol=0, atol=0)
        (wanted,) = torch.autograd.grad(loss(x), x)
        (got,) = torch.autograd.grad(compiled(x), x)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_gives_the_same_gradient(use_reentrant: bool) -> None:
    weight = torch.randn(50, 50, requires_grad=True)
    x = torch.randn(6, 50, requires_grad=True)

    def block(v: torch.Tensor) -> torch.Tensor:
        return topk_mask(v @ weight, 9) ** 2

    wanted = torch.autograd.grad(block(x).sum(), (x, weight))
    out = checkpoint(block, x, use_reentrant=use_reentrant)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(weight.grad, wanted[1])


def test_vmap_is_refused_by_name() -> None:
    with pytest.raises(TopKArgumentError, match="whole tensor"):
        torch.func.vmap(lambda v: topk_mask(v, 2))(torch.randn(3, 10))


def test_non_contiguous_input_is_masked_like_its_copy() -> None:
    base = torch.randn(6, 5, 64)
    views = (base.transpose(0, 1), base[:, ::2], base[..., ::3], base[:, :1].expand(6, 5, 64))
    for x in views:
        y, bits = topk_mask_with_bits(x, 4)
        wanted_y, wanted_bits = topk_mask_reference(x.contiguous(), 4, "value")
        assert y.is_contiguous()
        assert torch.equal(y, wanted_y)
        assert torch.equal(bits, wanted_bits)


def test_non_contiguous_gradient_is_masked_by_position() -> None:
    x = torch.randn(5, 7, 33, requires_grad=True)
    y, bits = topk_mask_with_bits(x, 4)
    dy = torch.randn(33, 7, 5).permute(2, 1, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dy * unpack_bits(bits, 33))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (1, 1, 1, 16), (3, 0)])
def test_any_leading_shape_even_an_empty_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y, bits = topk_mask_with_bits(x, 5)
    y.sum().backward()
    assert y.shape == shape
    assert bits.shape == (*shape[:-1], (shape[-1] + 31) // 32)
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("k", [40, 41, 10_000])
def test_k_of_the_row_or_more_is_the_identity(k: int) -> None:
    x = make_rows("nans", (3, 40), torch.float32)
    assert topk_mask(x, k) is x
    y, bits = topk_mask_with_bits(x, k)
    assert torch.equal(as_bits(y), as_bits(x))
    assert bool(unpack_bits(bits, 40).all())
    assert torch.equal(bits[:, 1], torch.full((3,), 0xFF, dtype=torch.int32))


def test_exactly_k_survive_when_all_values_tie() -> None:
    y, bits = topk_mask_with_bits(torch.ones(4, 1000, dtype=torch.bfloat16), 123)
    assert torch.equal(unpack_bits(bits, 1000), torch.arange(1000).expand(4, -1) < 123)
    assert y.sum(dim=-1, dtype=torch.float32).tolist() == [123.0] * 4
