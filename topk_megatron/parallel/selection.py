"""The registry of selections: which coordinates S a TopK kept, for every live output.

S leaves the operator as a bitmask beside the output. Two places want it later, when they hold
nothing but the output: the transport between pipeline stages, which sends the k entries on S, and
saving for the backward pass, which keeps them. Both ask the registry of their model for the tensor
in their hands.

A tensor is recognised by its memory and not by its identity: Megatron wraps outputs in views, and
autograd saves aliases. An entry therefore answers only for the whole and unchanged tensor: the same
live storage, address, dtype, number of elements and version, and contiguous. Anything else gets no
answer, and the caller treats the tensor as dense.

Shapes: N rows, H hidden size, K kept, W words of a bitmask.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from topk_megatron.ops.library import OPS


class Selection:
    """S of every row of one tensor, as a bitmask, as indices, or as both.

    Attributes:
        shape: shape [..., H] of the tensor.
        k: kept entries per row.
        bits_NW: int32 bitmask, or None if S arrived as indices.
        packed: what saving keeps in place of the tensor, built once; None before.
    """

    def __init__(
        self,
        shape: torch.Size,
        k: int,
        *,
        bits: Tensor | None = None,
        indices_NK: Tensor | None = None,
    ) -> None:
        """Give either the bitmask int32 [..., W] or the indices [N, K]."""
        assert (bits is None) != (indices_NK is None)
        self.shape, self.k = shape, k
        self.bits_NW = None if bits is None else bits.detach().reshape(-1, bits.shape[-1])
        self._indices_NK = indices_NK
        self.packed: Any = None

    def indices_NK(self) -> Tensor:
        """The kept coordinates of every row, ascending, in the type of `index_dtype`."""
        if self._indices_NK is not None:
            return self._indices_NK
        assert self.bits_NW is not None
        return OPS.bits_to_indices(self.bits_NW, self.shape[-1], self.k)


class Memory:
    """Recognises a tensor by its memory, without keeping it alive."""

    def __init__(self, x: Tensor) -> None:
        self.address = x.data_ptr()
        self._shape, self._dtype, self._version = x.shape, x.dtype, x._version
        self._storage = StorageWeakRef(x.untyped_storage())

    @property
    def is_free(self) -> bool:
        """Whether the tensor and all its aliases are gone."""
        return self._storage.expired()

    def holds(self, x: Tensor) -> bool:
        """Whether `x` is the tensor itself or a reshaped view of it, whole and unchanged."""
        return (
            not self.is_free
            and x.data_ptr() == self.address
            and x.dtype == self._dtype
            and x.numel() == self._shape.numel()
            and x.is_contiguous()
            and x._version == self._version
        )


class SelectionRegistry:
    """The selections of the TopK outputs of one rank; everyone who needs S asks `of`.

    Attributes:
        active: whether outputs are remembered; set by whoever will ask.
    """

    def __init__(self) -> None:
        self.active = False
        self._entries: dict[int, tuple[Memory, Selection]] = {}

    def remember(self, x: Tensor, selection: Selection) -> None:
        """Register the selection of `x`, and forget those whose tensors are gone."""
        for address in [a for a, (memory, _) in self._entries.items() if memory.is_free]:
            del self._entries[address]
        memory = Memory(x)
        self._entries[memory.address] = memory, selection

    def of(self, x: Tensor) -> Selection | None:
        """The selection of a whole and unchanged TopK output; None for any other tensor."""
        entry = self._entries.get(x.data_ptr())
        return entry[1] if entry is not None and entry[0].holds(x) else None

    def clear(self) -> None:
        """Forget every selection, at the end of a step."""
        self._entries.clear()
