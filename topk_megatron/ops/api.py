"""`topk_mask`: keep the k largest coordinates of every row, with the exact gradient.

The gradient is dy on the selected set S and 0 elsewhere. S is saved as a packed bitmask (H / 8
bytes per row) because ``y != 0`` would lose the gradient of a kept zero. A selected row has k
values and k indices; `pack_sparse` and `unpack_sparse` convert between that form and the dense one.
"""

import torch
from torch import Tensor

from topk_megatron.ops.library import OPS, TopKArgumentError
from topk_megatron.ops.reference import KEYS, num_words

# Modes that the compiled kernels know.
_KERNEL_MODES = ("value", "abs")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HIDDEN_SIZE = 1 << 20

_topk_mask_op = OPS.topk_mask.default
_gather_row_op = OPS.gather_row.default
_scatter_row_op = OPS.scatter_row.default
_bits_to_indices_op = OPS.bits_to_indices.default


def topk_mask_with_bits(x: Tensor, k: int, *, mode: str = "value") -> tuple[Tensor, Tensor]:
    """Do what `topk_mask` does, and also return S as packed int32 words [..., ceil(H / 32)].

    Bit j of word w is set when coordinate 32 w + j is selected. With k >= H every coordinate of
    the row is selected. The bits carry no gradient.
    """
    _check_arguments(x, k, mode)
    return _select(x, max(1, min(k, x.shape[-1])), mode)


def topk_mask(x: Tensor, k: int, *, mode: str = "value") -> Tensor:
    """Zero all but the k coordinates of the last dimension with the largest key.

    Args:
        x: [..., H] in float32, bfloat16, float16 or float64 (float64 on CPU only).
        k: number of coordinates kept in every row; k >= H is the identity and returns x itself.
        mode: ``value`` compares x (the paper's choice), ``abs`` compares \\|x\\|.

    Returns:
        y: [..., H] in x's dtype; exactly min(k, H) coordinates are selected in every row.

    Raises:
        TopKArgumentError: k is less than 1, H exceeds `MAX_HIDDEN_SIZE`, x is a scalar, or dtype
            or mode is not one of those listed.
    """
    _check_arguments(x, k, mode)
    if k >= x.shape[-1]:
        return x
    return _select(x, k, mode)[0]


def _select(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    if mode in _KERNEL_MODES:
        return _topk_mask_op(x, k, mode)
    # S by the key, then x on S: masking is what the backward op does, and it has a gradient.
    bits = _topk_mask_op(KEYS[mode](x.detach()), k, "value")[1]
    return OPS.topk_mask_backward(x, bits), bits


def pack_sparse(y: Tensor, bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gather the selected coordinates of every row, in ascending index order.

    The gradient of y is dvalues on S and 0 elsewhere.

    Args:
        y: [..., H] floating, the dense tensor.
        bits: int32 [..., ceil(H / 32)] with exactly k bits set in every row.
        k: number of selected coordinates, 1 <= k <= H.

    Returns:
        values: [..., k] in y's dtype.
        indices: [..., k] in the smallest type that holds all indices: uint8 for H up to 256, int16
            up to 32,768, int32 above. (torch's uint16 would serve up to 65,536, but few ops and no
            collective accept it.)

    Raises:
        TopKArgumentError: shapes, dtypes or devices do not fit together.
    """
    if y.dim() == 0 or not 1 <= k <= y.shape[-1]:
        raise TopKArgumentError(
            f"pack_sparse needs y of shape [..., H] and 1 <= k <= H, got k = {k} and y of shape"
            f" {tuple(y.shape)}"
        )
    _check_dtype("y", y)
    _check_bits(y, bits)
    indices = _bits_to_indices_op(bits, y.shape[-1], k)
    return _gather_row_op(y, indices), indices


def unpack_sparse(values: Tensor, indices: Tensor, hidden_size: int) -> Tensor:
    """Invert `pack_sparse`: turn values and indices [..., k] into the dense [..., hidden_size].

    Coordinates that no index names are +0. The gradient of values is dy at the indices.

    Raises:
        TopKArgumentError: values and indices differ in shape or device, indices are not integers,
            or hidden_size is less than k.
    """
    if values.shape != indices.shape or values.dim() == 0:
        raise TopKArgumentError(
            "unpack_sparse needs values and indices of the same shape [..., k], got"
            f" {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    _check_dtype("values", values)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TopKArgumentError(f"indices must be an integer tensor, got {indices.dtype}")
    if values.device != indices.device:
        raise TopKArgumentError(
            f"values and indices must be on one device, got {values.device} and {indices.device}"
        )
    if hidden_size < values.shape[-1]:
        raise TopKArgumentError(
            f"hidden_size must be at least k = {values.shape[-1]}, got {hidden_size}"
        )
    return _scatter_row_op(values, indices, hidden_size)


def _check_bits(y: Tensor, bits: Tensor) -> None:
    expected = (*y.shape[:-1], num_words(y.shape[-1]))
    if tuple(bits.shape) != expected or bits.dtype != torch.int32:
        raise TopKArgumentError(
            f"bits of a tensor of shape {tuple(y.shape)} must be int32 of shape {expected}, got"
            f" {bits.dtype} of shape {tuple(bits.shape)}; pass the bits that topk_mask_with_bits"
            " returned"
        )
    if bits.device != y.device:
        raise TopKArgumentError(
            f"y and bits must be on one device, got {y.device} and {bits.device}"
        )


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TopKArgumentError(f"{name} must be one of {allowed}, got {x.dtype}; convert it first")


def _check_arguments(x: Tensor, k: int, mode: str) -> None:
    if mode not in KEYS:
        raise TopKArgumentError(f"mode must be one of {', '.join(KEYS)}, got {mode!r}")
    _check_dtype("x", x)
    if x.is_cuda and x.dtype == torch.float64:
        raise TopKArgumentError("float64 is supported on CPU only; convert x to float32 first")
    if x.dim() == 0:
        raise TopKArgumentError("x must have at least one dimension [..., H], got a scalar")
    if k < 1:
        raise TopKArgumentError(f"k must be at least 1, got {k}")
    if x.shape[-1] > MAX_HIDDEN_SIZE:
        raise TopKArgumentError(
            f"the last dimension H may be at most {MAX_HIDDEN_SIZE}, got {x.shape[-1]}"
        )
