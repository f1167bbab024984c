"""The wire format of a TopK hidden state and its gradient between two pipeline stages.

In the forward pass, a row of H numbers of which k are kept travels as its k values and either its k
indices or a bitmask of H bits, whichever is smaller. In the backward pass, the k gradient entries
at the same indices travel. The format depends only on H, k and the dtype, so both sides know it in
advance.

One message is one uint8 buffer: the values of all rows, padding to 8 bytes, and the indices or
bitmasks of all rows.

Shapes: N rows, H hidden size, K kept, W words of a bitmask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import index_dtype, num_words

# A format that saves a smaller share of the bytes than this is not worth packing and unpacking.
_MIN_SAVING = 0.5
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """Sizes of the parts of a message.

    Attributes:
        hidden_size: H.
        k: kept entries per row.
        dtype: type of the values.
        bitmask: whether S travels as a bitmask rather than as indices.
    """

    hidden_size: int
    k: int
    dtype: torch.dtype
    bitmask: bool

    @property
    def selection_bytes(self) -> int:
        """Size of one row's indices or bitmask in bytes."""
        return _bitmask_bytes(self.hidden_size) if self.bitmask else _index_bytes(self)

    def values_bytes(self, rows: int) -> int:
        """Return the size of all rows' values in bytes, which is a gradient's whole message."""
        return rows * self.k * self.dtype.itemsize

    def message_bytes(self, rows: int) -> int:
        """Return the size of a forward message in bytes."""
        return aligned(self.values_bytes(rows)) + rows * self.selection_bytes


def wire_format(hidden_size: int, k: int, dtype: torch.dtype) -> WireFormat | None:
    """Choose the format of rows that keep k of `hidden_size` entries; None means dense.

    Args:
        hidden_size: H.
        k: kept entries per row.
        dtype: type of the values.
    """
    by_index, by_mask = (
        WireFormat(hidden_size=hidden_size, k=k, dtype=dtype, bitmask=bitmask)
        for bitmask in (False, True)
    )
    chosen = by_mask if by_mask.selection_bytes <= by_index.selection_bytes else by_index
    sparse = k * dtype.itemsize + chosen.selection_bytes
    dense = hidden_size * dtype.itemsize
    return chosen if sparse <= (1 - _MIN_SAVING) * dense else None


def pack_hidden(wire: WireFormat, x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a TopK output, and find the indices to keep for its gradient.

    Args:
        wire: the format.
        x: [..., H], the output of a TopK.
        bits: int32 [..., W], its selection.

    Returns:
        The message, uint8 [message_bytes], and the indices, [N, K] in the type of `index_dtype`.
    """
    rows_NH = x.detach().reshape(-1, wire.hidden_size)
    bits_NW = bits.reshape(rows_NH.shape[0], -1)
    indices_NK = OPS.bits_to_indices(bits_NW, wire.hidden_size, wire.k)
    message = torch.empty(wire.message_bytes(rows_NH.shape[0]), dtype=torch.uint8, device=x.device)
    values_NK, selection = _parts(wire, message, rows_NH.shape[0])
    values_NK.copy_(OPS.gather_row(rows_NH, indices_NK))
    selection.copy_(bits_NW if wire.bitmask else indices_NK)
    return message, indices_NK


def unpack_hidden(wire: WireFormat, message: Tensor, out: Tensor) -> Tensor:
    """Write the dense hidden state into `out` [..., H], and return the indices [N, K]."""
    rows = out.numel() // wire.hidden_size
    values_NK, selection = _parts(wire, message, rows)
    if wire.bitmask:
        indices_NK = OPS.bits_to_indices(selection, wire.hidden_size, wire.k)
    else:
        indices_NK = selection.clone()  # a view would keep the message alive
    _scatter_into(out, values_NK, indices_NK)
    return indices_NK


def pack_gradient(x: Tensor, indices_NK: Tensor) -> Tensor:
    """Pack a gradient [..., H]: its entries at `indices_NK`, as uint8."""
    values_NK = OPS.gather_row(x.detach().reshape(indices_NK.shape[0], -1), indices_NK)
    return values_NK.view(-1).view(torch.uint8)


def unpack_gradient(wire: WireFormat, message: Tensor, indices_NK: Tensor, out: Tensor) -> None:
    """Write the gradient into `out` [..., H], with +0 off S."""
    _scatter_into(out, message.view(wire.dtype).view(indices_NK.shape), indices_NK)


def _parts(wire: WireFormat, message: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return views of a message: values [N, K], and indices [N, K] or bitmasks [N, W]."""
    end = wire.values_bytes(rows)
    values = message[:end].view(wire.dtype).view(rows, wire.k)
    rest = message[aligned(end) :]
    dtype = torch.int32 if wire.bitmask else index_dtype(wire.hidden_size)
    return values, rest.view(dtype).view(rows, -1)


def _scatter_into(out: Tensor, values_NK: Tensor, indices_NK: Tensor) -> None:
    """Scatter like OPS.scatter_row into existing memory; bitwise, also for NaN payloads."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
    rows_NH = out.detach().view(indices_NK.shape[0], -1).view(integers)
    rows_NH.zero_().scatter_(-1, indices_NK.long(), values_NK.contiguous().view(integers))


def aligned(size: int) -> int:
    """Round a size in bytes up to where the next part of a message may begin."""
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _bitmask_bytes(hidden_size: int) -> int:
    return num_words(hidden_size) * torch.int32.itemsize


def _index_bytes(wire: WireFormat) -> int:
    return wire.k * index_dtype(wire.hidden_size).itemsize
