"""Derivatives of the ops: S is constant almost everywhere, so each op is linear in its first input.

Reverse mode keeps S, as a bitmask or as indices, and calls the kernels again. Forward mode and the
transforms of `torch.func` run through torch's own ops on S instead, which have every derivative.
`torch.library.register_autograd` knows reverse mode only: without this file's kernels a tangent
would be lost silently.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from topk_megatron.ops.reference import keep_selected

OPS = torch.ops.topk_megatron
Below = Callable[..., Any]  # the op without derivatives: the kernel, or the reference


class _TopKMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Below, x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
        y, bits = below(x, k, mode)
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        return y, bits

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:  # pyright: ignore
        (bits,) = ctx.saved_tensors
        dx = None if dy is None else OPS.topk_mask_backward(dy, bits)
        return None, dx, None, None


class _TopKMaskBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Below, dy: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(bits)
        return below(dy, bits)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:  # pyright: ignore
        (bits,) = ctx.saved_tensors
        return None, OPS.topk_mask_backward(ddx, bits), None


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Below, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.hidden_size = x.shape[-1]
        return below(x, indices)

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> Any:  # pyright: ignore
        (indices,) = ctx.saved_tensors
        return None, OPS.scatter_row(dvalues, indices, ctx.hidden_size), None


class _ScatterRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, below: Below, values: Tensor, indices: Tensor, hidden_size: int
    ) -> Tensor:
        ctx.save_for_backward(indices)
        return below(values, indices, hidden_size)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:  # pyright: ignore
        (indices,) = ctx.saved_tensors
        return None, OPS.gather_row(dx, indices), None, None


# ---- the same by torch's own ops -----------------------------------------------------------------


def _select(below: Below, x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    bits = below(x, k, mode)[1]
    return _mask(below, x, bits), bits


def _mask(_: Below, x: Tensor, bits: Tensor) -> Tensor:
    return keep_selected(x, bits)


def _gather(_: Below, x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(-1, indices.long())


def _scatter(_: Below, values: Tensor, indices: Tensor, hidden_size: int) -> Tensor:
    zeros = values.new_zeros((*values.shape[:-1], hidden_size))
    return zeros.scatter(-1, indices.long(), values)


_FORMULAS: dict[str, tuple[type[torch.autograd.Function], Callable[..., Any]]] = {
    "topk_mask": (_TopKMask, _select),
    "topk_mask_backward": (_TopKMaskBackward, _mask),
    "gather_row": (_GatherRow, _gather),
    "scatter_row": (_ScatterRow, _scatter),
}


def register_derivatives(library: torch.library.Library) -> None:
    """Register the derivatives of every op that has one."""
    for name, (reverse, composite) in _FORMULAS.items():
        kernel = _make_kernel(getattr(OPS, name).default, reverse, composite)
        library.impl(name, kernel, "Autograd", with_keyset=True)


def _make_kernel(
    op: Any, reverse: type[torch.autograd.Function], composite: Callable[..., Any]
) -> Callable[..., Any]:
    def kernel(keyset: Any, x: Tensor, *args: Any) -> Any:
        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        if _is_transformed(x):
            return composite(below, x, *args)
        if torch.is_grad_enabled() and x.requires_grad:
            return reverse.apply(below, x, *args)
        return below(x, *args)

    return kernel


def _is_transformed(x: Tensor) -> bool:
    """Return whether x carries a tangent or belongs to a transform of `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad.unpack_dual(x).tangent is not None
