"""The definition of top-k plus mask, by a stable sort: the oracle of every test.

``y[i] = x[i] if i in S else +0`` where S holds the k coordinates of the last dimension with the
largest keys (``x`` in mode ``value``, ``|x|`` in mode ``abs``). Ties go to the lowest index, +0 and
-0 are equal keys, and NaN is larger than everything. ``torch.topk`` breaks ties differently on each
device, so it is never used here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WORD_BITS = 32
_SLICE_WORDS = 1 << 16  # `count_bits_reference` unpacks this many words at a time, to 8 MB
# The selection modes: the key that is compared, [..., H] to [..., H]. This is the one definition;
# a mode without a kernel of its own selects by the kernels of ``value`` on its key.
KEYS: dict[str, Callable[[Tensor], Tensor]] = {"value": lambda x: x, "abs": torch.abs}


def num_words(hidden_size: int) -> int:
    """Return the number of words in the bitmask of a row of `hidden_size` coordinates."""
    return (hidden_size + WORD_BITS - 1) // WORD_BITS


def index_dtype(hidden_size: int) -> torch.dtype:
    """Return the smallest integer type that holds every index and that collectives can carry."""
    if hidden_size <= 1 << 8:
        return torch.uint8
    return torch.int16 if hidden_size <= 1 << 15 else torch.int32


def topk_mask_reference(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    """Select the k largest coordinates of each row.

    Args:
        x: [..., H], any real floating dtype.
        k: number of coordinates kept, 1 <= k <= H.
        mode: a name in `KEYS`.

    Returns:
        y: [..., H], x where selected (bitwise) and +0 elsewhere.
        bits: int32 [..., ceil(H / 32)]; bit j of word w is set if coordinate 32 w + j is selected.
    """
    order = torch.sort(KEYS[mode](x), dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :k], True)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)), pack_bits(mask)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask [..., H] into int32 words [..., ceil(H / 32)], lowest bit first."""
    padding = -mask.shape[-1] % WORD_BITS
    padded = torch.nn.functional.pad(mask, (0, padding))
    grouped = padded.reshape(*mask.shape[:-1], padded.shape[-1] // WORD_BITS, WORD_BITS)
    weights = torch.ones(WORD_BITS, dtype=torch.int64, device=mask.device)
    weights = weights << torch.arange(WORD_BITS, device=mask.device)
    return (grouped.to(torch.int64) * weights).sum(dim=-1).to(torch.int32)


def unpack_bits(bits: Tensor, hidden_size: int) -> Tensor:
    """Invert `pack_bits`: turn int32 words [..., ceil(H / 32)] into a boolean mask [..., H]."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    mask = (bits.unsqueeze(-1) >> shifts) & 1
    return mask.reshape(*bits.shape[:-1], bits.shape[-1] * WORD_BITS)[..., :hidden_size].bool()


def keep_selected(x: Tensor, bits: Tensor) -> Tensor:
    """Return x [..., H] where the bits are set, bitwise, and +0 elsewhere."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(unpack_bits(bits, x.shape[-1]), x, zero)


def bits_to_indices_reference(bits: Tensor, hidden_size: int, k: int) -> Tensor:
    """Return the positions of the set bits in ascending order, [..., k]; every row must have k.

    No shape depends on the data, so this neither synchronises a device nor breaks a graph.
    """
    mask = unpack_bits(bits, hidden_size)
    place = torch.where(mask, mask.cumsum(dim=-1) - 1, k)  # the unselected go to a spare column
    positions = torch.arange(hidden_size, dtype=index_dtype(hidden_size), device=bits.device)
    out = positions.new_empty((*bits.shape[:-1], k + 1))
    return out.scatter_(-1, place, positions.expand(mask.shape))[..., :k].contiguous()


def count_bits_reference(bits: Tensor, hidden_size: int) -> Tensor:
    """Count the rows of int32 [..., ceil(H / 32)] in which each coordinate is set: int64 [H]."""
    rows_NW = bits.reshape(-1, num_words(hidden_size))
    counts_H = torch.zeros(hidden_size, dtype=torch.int64, device=bits.device)
    for slice_NW in rows_NW.split(max(1, _SLICE_WORDS // max(1, rows_NW.shape[1]))):
        counts_H += unpack_bits(slice_NW, hidden_size).sum(dim=0)
    return counts_H
