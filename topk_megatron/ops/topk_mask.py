"""`topk_mask`: keep the k largest coordinates of every row, with the exact gradient.

The gradient is dy on the selected set S and 0 elsewhere. S is saved as a packed bitmask (H / 8
bytes a row) because ``y != 0`` would lose the gradient of a kept zero.
"""

from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops.errors import TopKArgumentError
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

MODES = ("value", "abs")


class _TopKMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
        y, bits = topk_mask_reference(x, k, mode)
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        return y, bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        dy = grads[0]
        return torch.where(unpack_bits(bits, dy.shape[-1]), dy, torch.zeros_like(dy)), None, None


def topk_mask_with_bits(x: Tensor, k: int, *, mode: str = "value") -> tuple[Tensor, Tensor]:
    """Like `topk_mask`, and also return S as packed int32 words [..., ceil(H / 32)]."""
    _check_arguments(x, k, mode)
    return _TopKMask.apply(x, min(k, x.shape[-1]), mode)  # pyright: ignore[reportReturnType]


def topk_mask(x: Tensor, k: int, *, mode: str = "value") -> Tensor:
    """Zero all but the k coordinates of the last dimension with the largest key.

    Args:
        x: [..., H], floating.
        k: coordinates kept in every row; k >= H is the identity.
        mode: ``value`` compares x (the paper's choice), ``abs`` compares \\|x\\|.

    Returns:
        y: [..., H] in x's dtype; exactly min(k, H) coordinates are selected in every row.

    Raises:
        TopKArgumentError: k < 1, a tensor that is not floating, no last dimension, or another mode.
    """
    _check_arguments(x, k, mode)
    if k >= x.shape[-1]:
        return x
    return topk_mask_with_bits(x, k, mode=mode)[0]


def _check_arguments(x: Tensor, k: int, mode: str) -> None:
    if mode not in MODES:
        raise TopKArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not x.is_floating_point():
        raise TopKArgumentError(f"x must be a floating tensor, got {x.dtype}")
    if x.dim() == 0:
        raise TopKArgumentError("x must have at least one dimension [..., H], got a scalar")
    if k < 1:
        raise TopKArgumentError(f"k must be at least 1, got {k}")
