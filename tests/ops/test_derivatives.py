"""Every derivative of the ops is right or refused: forward mode, `torch.func`, and compositions."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from tests.rows import DTYPES, MODES, as_bits, make_rows
from topk_megatron.ops import pack_sparse, topk_mask, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

OPS = torch.ops.topk_megatron
WIDTH, K = 40, 7


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=generator)


def selected(x: torch.Tensor, mode: str = "value") -> torch.Tensor:
    return unpack_bits(topk_mask_reference(x.detach(), K, mode)[1], x.shape[-1])


def packed(x: torch.Tensor) -> torch.Tensor:
    y, bits = topk_mask_with_bits(x, K)
    values, indices = pack_sparse(y, bits, K)
    return unpack_sparse(values**2, indices, WIDTH)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangent_is_masked_like_the_gradient(
    requires_grad: bool, dtype: torch.dtype, mode: str
) -> None:
    x = make_rows("zeros_of_both_signs", (3, WIDTH), dtype)
    tangent = make_rows("normal", (3, WIDTH), dtype, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent)
        y, bits = topk_mask_with_bits(dual, K, mode=mode)
        got = forward_ad.unpack_dual(y)
    assert torch.equal(as_bits(got.primal), as_bits(topk_mask(x, K, mode=mode)))
    wanted = OPS.topk_mask_backward(tangent, bits)
    assert got.tangent is not None
    assert torch.equal(as_bits(got.tangent), as_bits(wanted))


@pytest.mark.parametrize("mode", MODES)
def test_jvp_is_the_tangent_on_the_selection(mode: str) -> None:
    x, tangent = rows(), rows(1)
    y_and_dy = torch.func.jvp(lambda v: topk_mask(v, K, mode=mode), (x,), (tangent,))
    assert torch.equal(y_and_dy[0], topk_mask(x, K, mode=mode))
    assert torch.equal(y_and_dy[1], tangent * selected(x, mode))


@pytest.mark.parametrize("function", [lambda v: topk_mask(v, K), packed], ids=["mask", "packed"])
def test_gradcheck_in_both_modes_and_both_orders(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = rows().requires_grad_()
    assert torch.autograd.gradcheck(
        function, (x,), check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        lambda v: function(v) ** 3, (x,), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_gradcheck_of_each_op_in_both_modes() -> None:
    x = rows().requires_grad_()
    bits = topk_mask_with_bits(x.detach(), K)[1]
    indices = OPS.bits_to_indices(bits, WIDTH, K)
    values = rows(2)[:, :K].clone().requires_grad_()
    for function, inputs in (
        (lambda v: OPS.topk_mask(v, K, "abs")[0], (x,)),
        (lambda v: OPS.topk_mask_backward(v, bits), (x,)),
        (lambda v: OPS.gather_row(v, indices), (x,)),
        (lambda v: OPS.scatter_row(v, indices, WIDTH), (values,)),
    ):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)


def test_transforms_of_torch_func_agree_with_autograd() -> None:
    x = rows()
    cubed = lambda v: (topk_mask(v, K) ** 3).sum()  # noqa: E731
    wanted = 3 * topk_mask(x, K) ** 2
    torch.testing.assert_close(torch.func.grad(cubed)(x), wanted)
    diagonal = torch.diag((6 * topk_mask(x, K)).flatten())
    torch.testing.assert_close(torch.func.hessian(cubed)(x).reshape(x.numel(), -1), diagonal)
    jacobian = torch.diag(selected(x).flatten().double())
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got = transform(lambda v: topk_mask(v, K))(x)
        assert torch.equal(got.reshape(x.numel(), -1), jacobian)


def test_forward_mode_compiles_as_one_graph() -> None:
    def push(x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda v: topk_mask(v, K), (x,), (tangent,))[1]

    x, tangent = rows(), rows(1)
    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, tangent), tangent * selected(x))
