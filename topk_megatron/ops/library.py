"""The custom ops behind `topk_mask`: schemas, fake kernels, autograd and the reference fallback.

The compiled libraries register kernels for the CPU and CUDA dispatch keys of these ops. The
reference is registered for all devices at once (CompositeExplicitAutograd). The dispatcher uses it
only where there is no kernel, so a missing extension needs no branch anywhere else.

    topk_mask(x, k, mode) -> (y, bits)        1 <= k <= H
    topk_mask_backward(dy, bits) -> dx        dy on S, +0 elsewhere
    bits_to_indices(bits, H, k) -> indices    ascending, k per row
    gather_row(x, indices) -> values          values[.., j] = x[.., indices[.., j]]
    scatter_row(values, indices, H) -> x      the inverse, +0 elsewhere
    count_bits(bits, H) -> counts             int64 [H]: rows in which the coordinate is set

Gather and scatter are torch's gather and scatter on the integers behind the floats. On the floats
themselves torch rewrites the payload of a signalling NaN, so a packed row would not be restored.
"""

from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops.extension import warn_fallback
from topk_megatron.ops.reference import (
    bits_to_indices_reference,
    count_bits_reference,
    index_dtype,
    num_words,
    topk_mask_reference,
    unpack_bits,
)

NAMESPACE = "topk_megatron"


class TopKArgumentError(ValueError):
    """An argument of a top-k operator is outside its domain; the message says what is allowed."""


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("topk_mask(Tensor x, int k, str mode) -> (Tensor, Tensor)")
_library.define("topk_mask_backward(Tensor dy, Tensor bits) -> Tensor")
_library.define("bits_to_indices(Tensor bits, int hidden_size, int k) -> Tensor")
_library.define("gather_row(Tensor x, Tensor indices) -> Tensor")
_library.define("scatter_row(Tensor values, Tensor indices, int hidden_size) -> Tensor")
_library.define("count_bits(Tensor bits, int hidden_size) -> Tensor")


# ---- the reference, wherever no kernel is registered -------------------------------------------


def _topk_mask_fallback(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    warn_fallback(x.device.type)
    y, bits = topk_mask_reference(x, k, mode)
    return y.contiguous(), bits


def _topk_mask_backward_fallback(dy: Tensor, bits: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=dy.dtype, device=dy.device)
    return torch.where(unpack_bits(bits, dy.shape[-1]), dy, zero).contiguous()


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _gather_row(x: Tensor, indices: Tensor) -> Tensor:
    raw = x.contiguous().view(_INTEGERS[x.element_size()])
    return raw.gather(-1, indices.long()).view(x.dtype)


def _scatter_row(values: Tensor, indices: Tensor, hidden_size: int) -> Tensor:
    raw = values.contiguous().view(_INTEGERS[values.element_size()])
    dense = raw.new_zeros((*values.shape[:-1], hidden_size))
    return dense.scatter_(-1, indices.long(), raw).view(values.dtype)


_library.impl("gather_row", _gather_row, "CompositeExplicitAutograd")
_library.impl("scatter_row", _scatter_row, "CompositeExplicitAutograd")
_library.impl("topk_mask", _topk_mask_fallback, "CompositeExplicitAutograd")
_library.impl("topk_mask_backward", _topk_mask_backward_fallback, "CompositeExplicitAutograd")
_library.impl("bits_to_indices", bits_to_indices_reference, "CompositeExplicitAutograd")
_library.impl("count_bits", count_bits_reference, "CompositeExplicitAutograd")


# ---- shapes without data, for torch.compile ------------------------------------------------------


@torch.library.register_fake(f"{NAMESPACE}::topk_mask")
def _topk_mask_fake(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    bits = x.new_empty((*x.shape[:-1], num_words(x.shape[-1])), dtype=torch.int32)
    return x.new_empty(x.shape), bits


@torch.library.register_fake(f"{NAMESPACE}::topk_mask_backward")
def _topk_mask_backward_fake(dy: Tensor, bits: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


@torch.library.register_fake(f"{NAMESPACE}::bits_to_indices")
def _bits_to_indices_fake(bits: Tensor, hidden_size: int, k: int) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], k), dtype=index_dtype(hidden_size))


@torch.library.register_fake(f"{NAMESPACE}::gather_row")
def _gather_row_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


@torch.library.register_fake(f"{NAMESPACE}::scatter_row")
def _scatter_row_fake(values: Tensor, indices: Tensor, hidden_size: int) -> Tensor:
    return values.new_empty((*values.shape[:-1], hidden_size))


@torch.library.register_fake(f"{NAMESPACE}::count_bits")
def _count_bits_fake(bits: Tensor, hidden_size: int) -> Tensor:
    return bits.new_empty((hidden_size,), dtype=torch.int64)


# ---- gradients: dy on S, and the same again for the second derivative ----------------------------


def _save_bits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    (bits,) = ctx.saved_tensors
    if dy is None:
        return None, None, None
    return torch.ops.topk_megatron.topk_mask_backward(dy, bits), None, None


def _save_bits_of_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.topk_megatron.topk_mask_backward(ddx, bits), None


torch.library.register_autograd(f"{NAMESPACE}::topk_mask", _backward, setup_context=_save_bits)
torch.library.register_autograd(
    f"{NAMESPACE}::topk_mask_backward", _double_backward, setup_context=_save_bits_of_backward
)


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.hidden_size = inputs[0].shape[-1]


def _gather_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.topk_megatron.scatter_row(dvalues, indices, ctx.hidden_size), None


def _scatter_backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.topk_megatron.gather_row(dx, indices), None, None


torch.library.register_autograd(
    f"{NAMESPACE}::gather_row", _gather_backward, setup_context=_save_indices
)
torch.library.register_autograd(
    f"{NAMESPACE}::scatter_row", _scatter_backward, setup_context=_save_indices
)


# ---- vmap: refused, because the op already takes any number of leading dimensions ----------------


def _refuse_vmap(*_: Any) -> Any:
    raise TopKArgumentError(
        "torch.func.vmap over topk_mask is not supported; call topk_mask on the whole tensor"
        " [..., H], which selects in every row separately"
    )


for _name in ("topk_mask", "topk_mask_backward", "bits_to_indices", "gather_row", "scatter_row"):
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _refuse_vmap)

OPS = torch.ops.topk_megatron  # callers import this, which makes sure that the ops are defined
