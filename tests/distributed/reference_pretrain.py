"""Pretraining with the operator's definition in place of its kernel.

An entry for `tests.harness.launch.pretrain`.
"""

from typing import Any

import torch
from torch import Tensor

from topk_megatron.compat import prepare_device
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits


class ReferenceTopK(torch.autograd.Function):
    """The operator's definition, forward and backward, without the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
        y, bits = topk_mask_reference(x, k, mode)
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        return y, bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        dy, _ = grads
        return torch.where(unpack_bits(bits, dy.shape[-1]), dy, 0.0), None, None


def main() -> None:
    """Train with the definition in place of the operator."""
    device = prepare_device()
    from topk_megatron.model import runtime
    from topk_megatron.train.main import run

    runtime.topk_mask_with_bits = lambda x, k, mode: ReferenceTopK.apply(x, k, mode)  # pyright: ignore
    run(device)


if __name__ == "__main__":
    main()
