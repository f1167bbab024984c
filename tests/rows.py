"""Rows that a selection kernel could get wrong, by kind, and bitwise comparison of results.

Shape suffix: R rows, H hidden, W words of the bitmask.
"""

from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops.reference import KEYS, topk_mask_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = tuple(KEYS)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
KINDS = (
    "normal",
    "few_distinct",
    "quantised",
    "all_equal",
    "relu",
    "mostly_zero",
    "all_negative",
    "zeros_of_both_signs",
    "infinities",
    "one_nan",
    "smallest_nan",
    "nans",
    "nans_and_infinities",
    "all_nan",
    "denormals",
    "random_bits",
    "ascending",
    "one_large_piece",
    "one_lane",
)


def as_bits(x: Tensor) -> Tensor:
    """Return the bit patterns of x as integers."""
    return x.contiguous().view(INTEGERS[x.element_size()])


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the floats whose bit patterns are the lowest bits of these int64."""
    return bits.to(INTEGERS[dtype.itemsize]).view(dtype)


def infinity_bits(dtype: torch.dtype) -> int:
    return int(as_bits(torch.tensor([float("inf")], dtype=dtype))[0])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    drawn = torch.randint(info.min, info.max, shape, generator=generator, device=generator.device)
    return from_bits(drawn, dtype)


def random_nans(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return NaNs of both signs and many payloads."""
    largest = torch.iinfo(INTEGERS[dtype.itemsize]).max
    where: Any = {"generator": generator, "device": generator.device}
    payload = torch.randint(infinity_bits(dtype) + 1, largest, shape, **where)
    negative = torch.rand(shape, **where) < 0.5
    return from_bits(torch.where(negative, payload - largest - 1, payload), dtype)


def choice(values: list[float], shape_RH: tuple[int, int], generator: torch.Generator) -> Tensor:
    where: Any = {"generator": generator, "device": generator.device}
    drawn = torch.randint(0, len(values), shape_RH, **where)
    return torch.tensor(values, device=generator.device)[drawn]


def make_rows(
    kind: str,
    shape_RH: tuple[int, int],
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """Make rows [R, H] of one kind, drawn on the device, whose random numbers are its own."""
    generator = torch.Generator(device).manual_seed(seed)
    where: Any = {"generator": generator, "device": device}
    normal = torch.randn(shape_RH, **where)
    share = torch.rand(shape_RH, **where)
    inf = float("inf")
    match kind:
        case "normal":
            x = normal
        case "few_distinct":
            x = (normal * 2).round() / 2
        case "quantised":  # not exact in fewer bits: ties that a truncated sample misses
            x = (normal * 8).round() / 3.7
        case "all_equal":
            x = normal[:, :1].expand(shape_RH)
        case "relu":
            x = normal.relu()
        case "mostly_zero":
            x = (normal - 2).relu()
        case "all_negative":
            x = -normal.abs() - 1
        case "zeros_of_both_signs":
            x = choice([0.0, -0.0, 0.0, -0.0, 1.0, -1.0], shape_RH, generator)
        case "infinities":
            x = choice([inf, -inf, 0.0, -0.0, 1.5, -inf], shape_RH, generator)
        case "one_nan":
            return torch.where(
                share == share.amax(-1, keepdim=True),
                random_nans(shape_RH, dtype, generator),
                normal.to(dtype),
            )
        case "smallest_nan":
            # The pattern next to infinity, positive in one row and negative in the next.
            lowest = torch.iinfo(INTEGERS[dtype.itemsize]).min
            negative = torch.arange(shape_RH[0], device=device)[:, None] % 2 * lowest
            return torch.where(
                share == share.amax(-1, keepdim=True),
                from_bits(negative + infinity_bits(dtype) + 1, dtype),
                normal.to(dtype),
            )
        case "nans":
            return torch.where(share < 0.3, random_nans(shape_RH, dtype, generator), normal).to(
                dtype
            )
        case "nans_and_infinities":  # next to each other in the order, and not equal
            infinite = choice([inf, -inf, inf, 1.5], shape_RH, generator)
            return torch.where(
                share < 0.3, random_nans(shape_RH, dtype, generator), infinite.to(dtype)
            )
        case "all_nan":
            return random_nans(shape_RH, dtype, generator)
        case "denormals":
            lowest = torch.iinfo(INTEGERS[dtype.itemsize]).min
            bits = torch.randint(-40, 40, shape_RH, **where)
            return from_bits(torch.where(bits < 0, lowest - bits, bits), dtype)
        case "random_bits":
            return random_bits(shape_RH, dtype, generator)
        case "ascending":  # all large values at one end
            x = normal.sort(dim=-1).values
        case "one_large_piece":  # a strided sample sees few of the largest, or too many
            x = normal.clone()
            x[:, shape_RH[1] // 3 : shape_RH[1] // 3 + shape_RH[1] // 8 + 1] += 9
        case "one_lane":  # the largest in every 32nd group of 16 bytes: one CUDA thread has them
            group = torch.arange(shape_RH[1], device=device) * dtype.itemsize // 16
            x = torch.where(group % 32 == 5, normal.abs() + 5, normal)
        case _:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return x.to(dtype).contiguous()


def interesting_ks(hidden_size: int) -> list[int]:
    """Return k at both ends and around the shares that models use."""
    wanted = {1, 2, hidden_size // 32, hidden_size // 16, hidden_size // 8, hidden_size // 2,
              hidden_size - 1, hidden_size}  # fmt: skip
    return sorted(k for k in wanted if 1 <= k <= hidden_size)


def assert_matches_reference(x: Tensor, k: int, mode: str) -> None:
    """Assert that the op on x equals the stable-sort reference bitwise, in y and in the mask."""
    y, bits = torch.ops.topk_megatron.topk_mask(x, k, mode)
    wanted_y, wanted_bits = topk_mask_reference(x, k, mode)
    case = f"H = {x.shape[-1]}, k = {k}, {mode}, {x.dtype}"
    assert torch.equal(bits, wanted_bits), f"selection differs: {case}"
    assert torch.equal(as_bits(y), as_bits(wanted_y)), f"y differs: {case}"
