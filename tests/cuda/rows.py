"""Rows that a selection kernel can get wrong, by kind, as exact bit patterns.

Shape suffix: R rows, H hidden.
"""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS_TYPE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}

KINDS = (
    "normal",
    "relu",
    "few_distinct",
    "all_equal",
    "zeros_of_both_signs",
    "infinities",
    "nans",
    "denormals",
    "random_bits",
    "ascending",
    "one_lane",
)


def as_bits(x: Tensor) -> Tensor:
    """The integers behind x, for bitwise comparison."""
    return x.view(_BITS_TYPE[x.dtype])


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(_BITS_TYPE[dtype]).view(dtype)


def _random_bits(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    width = torch.finfo(dtype).bits
    bits = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), shape, generator=generator)
    return _from_bits(bits, dtype)


def _nans(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """NaNs of any sign and payload among infinities and normal values."""
    infinity = _INFINITY[dtype]
    sign = torch.randint(0, 2, shape, generator=generator) * -(2 ** (torch.finfo(dtype).bits - 1))
    largest = torch.iinfo(_BITS_TYPE[dtype]).max
    payload = torch.randint(infinity, largest + 1, shape, generator=generator)
    special = _from_bits(sign + payload, dtype)
    normal = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, special, normal)


def _choice(
    values: list[float], shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    index = torch.randint(0, len(values), shape, generator=generator)
    return torch.tensor(values, dtype=dtype)[index]


def make_rows(kind: str, shape_RH: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Rows [R, H] of one kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape_RH, generator=generator)
    match kind:
        case "normal":
            return normal.to(dtype)
        case "relu":
            return normal.relu().to(dtype)
        case "few_distinct":
            return (normal * 2).round().div(2).to(dtype)
        case "all_equal":
            return normal[:, :1].expand(shape_RH).to(dtype).clone()
        case "zeros_of_both_signs":
            return _choice([0.0, -0.0, 0.0, -0.0, 1.0, -1.0], shape_RH, dtype, generator)
        case "infinities":
            values = [float("inf"), float("-inf"), 0.0, -0.0, 1.5, float("-inf")]
            return _choice(values, shape_RH, dtype, generator)
        case "nans":
            return _nans(shape_RH, dtype, generator)
        case "denormals":
            bits = torch.randint(-40, 40, shape_RH, generator=generator)
            lowest = -(2 ** (torch.finfo(dtype).bits - 1))
            return _from_bits(torch.where(bits < 0, lowest - bits, bits), dtype)
        case "random_bits":
            return _random_bits(shape_RH, dtype, generator)
        case "ascending":  # all the large values in one corner: the floor is loose
            return normal.sort(dim=-1).values.to(dtype)
        case "one_lane":  # all the large values in every 32nd slot: one column fills up
            slot = 16 * 8 // torch.finfo(dtype).bits
            heavy = torch.arange(shape_RH[1]).div(slot, rounding_mode="floor") % 32 == 5
            return torch.where(heavy, normal.abs() + 5, normal).to(dtype)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
