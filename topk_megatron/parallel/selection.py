"""The registry of selections: which coordinates S a TopK kept, for every live output.

The operator returns S as a bitmask next to the output. Two places need S later, when they hold only
the output: the transport between pipeline stages sends the k entries on S, and saving for the
backward pass keeps them. Both look up the tensor they hold in the registry of their model.

A tensor is recognised by its memory, not by its identity: Megatron wraps outputs in views, and
autograd saves aliases. An entry therefore matches only the whole and unchanged tensor, contiguous
and with the same live storage, address, dtype, number of elements and version. For anything else
the registry has no answer, and the caller treats the tensor as dense.

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
        packed: packed form that saving keeps in place of the tensor; None until it is built.
    """

    def __init__(
        self,
        shape: torch.Size,
        k: int,
        *,
        bits: Tensor | None = None,
        indices_NK: Tensor | None = None,
    ) -> None:
        """Take S as either a bitmask or indices.

        Args:
            shape: shape [..., H] of the tensor.
            k: kept entries per row.
            bits: int32 bitmask [..., W].
            indices_NK: kept coordinates, ascending in each row.
        """
        assert (bits is None) != (indices_NK is None)
        self.shape, self.k = shape, k
        self.bits_NW = None if bits is None else bits.detach().reshape(-1, bits.shape[-1])
        self._indices_NK = indices_NK
        self.packed: Any = None

    def indices_NK(self) -> Tensor:
        """Return the kept coordinates of every row, ascending, in the type of `index_dtype`."""
        if self._indices_NK is not None:
            return self._indices_NK
        assert self.bits_NW is not None
        return OPS.bits_to_indices(self.bits_NW, self.shape[-1], self.k)


class Memory:
    """Recognises a tensor by its memory, without keeping it alive.

    Attributes:
        address: address of the tensor's first element.
    """

    def __init__(self, x: Tensor) -> None:
        self.address = x.data_ptr()
        self._shape, self._dtype, self._version = x.shape, x.dtype, x._version
        self._storage = StorageWeakRef(x.untyped_storage())

    @property
    def is_free(self) -> bool:
        """Whether the tensor and all its aliases are gone."""
        return self._storage.expired()

    def holds(self, x: Tensor) -> bool:
        """Return whether `x` is the tensor or a reshaped view of it, whole and unchanged."""
        return (
            not self.is_free
            and x.data_ptr() == self.address
            and x.dtype == self._dtype
            and x.numel() == self._shape.numel()
            and x.is_contiguous()
            and x._version == self._version
        )


class SelectionRegistry:
    """The selections of the TopK outputs of one rank; `of` returns them.

    Attributes:
        active: whether outputs are remembered; set by the code that will look them up.
    """

    def __init__(self) -> None:
        self.active = False
        self._entries: dict[int, tuple[Memory, Selection]] = {}

    def remember(self, x: Tensor, selection: Selection) -> None:
        """Register the selection of `x`, and forget the selections of freed tensors."""
        for address in [a for a, (memory, _) in self._entries.items() if memory.is_free]:
            del self._entries[address]
        memory = Memory(x)
        self._entries[memory.address] = memory, selection

    def of(self, x: Tensor) -> Selection | None:
        """Return the selection of a whole and unchanged TopK output, or None for other tensors."""
        entry = self._entries.get(x.data_ptr())
        return entry[1] if entry is not None and entry[0].holds(x) else None

    def clear(self) -> None:
        """Forget every selection."""
        self._entries.clear()
