"""The custom ops behind `topk_mask`: schemas, fake kernels and the reference fallback.

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

k and H are SymInt in the schemas: torch.compile then traces a k that anneals as a symbol and does
not compile at every step. Kernels get plain integers.
"""

from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops.derivatives import register_derivatives
from topk_megatron.ops.extension import warn_fallback
from topk_megatron.ops.reference import (
    bits_to_indices_reference,
    count_bits_reference,
    index_dtype,
    keep_selected,
    num_words,
    topk_mask_reference,
)

NAMESPACE = "topk_megatron"


class TopKArgumentError(ValueError):
    """An argument of a top-k operator is outside its domain; the message says what is allowed."""


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("topk_mask(Tensor x, SymInt k, str mode) -> (Tensor, Tensor)")
_library.define("topk_mask_backward(Tensor dy, Tensor bits) -> Tensor")
_library.define("bits_to_indices(Tensor bits, SymInt hidden_size, SymInt k) -> Tensor")
_library.define("gather_row(Tensor x, Tensor indices) -> Tensor")
_library.define("scatter_row(Tensor values, Tensor indices, SymInt hidden_size) -> Tensor")
_library.define("count_bits(Tensor bits, SymInt hidden_size) -> Tensor")


# ---- the reference, wherever no kernel is registered -------------------------------------------


def _topk_mask_fallback(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    warn_fallback(x.device.type)
    y, bits = topk_mask_reference(x, k, mode)
    return y.contiguous(), bits


def _topk_mask_backward_fallback(dy: Tensor, bits: Tensor) -> Tensor:
    return keep_selected(dy, bits).contiguous()


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


# ---- derivatives ---------------------------------------------------------------------------------

register_derivatives(_library)


# ---- vmap: refused, because the op already takes any number of leading dimensions ----------------


def _refuse_vmap(*_: Any) -> Any:
    raise TopKArgumentError(
        "torch.func.vmap over topk_mask is not supported; call topk_mask on the whole tensor"
        " [..., H], which selects in every row separately"
    )


for _name in ("topk_mask", "topk_mask_backward", "bits_to_indices", "gather_row", "scatter_row"):
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _refuse_vmap)

OPS = torch.ops.topk_megatron  # callers import this, which makes sure that the ops are defined
