"""Sparse saved activations: what autograd keeps of a TopK output is its k values and S.

Full recompute keeps the input of every layer until its backward pass, and without it a norm keeps
its input; where that is a TopK output, only k of H numbers are worth keeping. Hooks on autograd's
saved tensors recognise TopK outputs by their storage, keep the packed form (one, however often the
tensor is saved) and expand it when it is asked for. S is the bitmask that the TopK's own backward
keeps anyway when there is no recompute.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from topk_megatron.ops.library import OPS
from topk_megatron.parallel.verify import Verifier


class PackedActivation:
    """A TopK output [..., H] as values [N, K] and a bitmask.

    Attributes:
        nbytes: memory of the packed form, its bitmask included.
    """

    def __init__(self, x: Tensor, bits: Tensor, k: int, verifier: Verifier) -> None:
        self.shape, self.k, self._verifier = x.shape, k, verifier
        rows = x.detach().reshape(-1, x.shape[-1])
        self.bits = bits.detach().reshape(rows.shape[0], -1)
        self.values = OPS.gather_row(rows, OPS.bits_to_indices(self.bits, x.shape[-1], k))
        self._dense = x.detach().clone() if verifier.active else None

    @property
    def nbytes(self) -> int:
        tensors = (self.values, self.bits)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def expand(self) -> Tensor:
        """The dense tensor, bitwise."""
        hidden_size = self.shape[-1]
        indices = OPS.bits_to_indices(self.bits, hidden_size, self.k)
        x = OPS.scatter_row(self.values, indices, hidden_size).view(self.shape)
        if self._dense is not None:
            self._verifier.check("saved activations", x, self._dense)
            self._dense = None
        return x


class SparseSaver:
    """Packs TopK outputs that autograd saves while the saver is entered.

    Attributes:
        dense_bytes: what the tensors that were packed would have taken, each counted once.
        packed_bytes: what their packed forms take.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.dense_bytes = self.packed_bytes = 0
        self._known: dict[int, _Known] = {}
        self._hooks: Any = None

    def remember(self, x: Tensor, bits: Tensor, k: int) -> None:
        """Announce a TopK output, so that it is recognised when it is saved."""
        if self._hooks is not None:
            self._known[x.data_ptr()] = _Known(x, bits, k)

    def enter(self) -> None:
        """Begin to pack what is saved from here on."""
        assert self._hooks is None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def leave(self) -> None:
        """End packing; what was packed is expanded whenever the backward pass comes."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
            self._known.clear()

    def _pack(self, tensor: Tensor) -> Any:
        known = self._known.get(tensor.data_ptr())
        if known is None or not known.is_the_memory_of(tensor):
            return tensor
        if known.packed is None:
            x = tensor.detach().view(known.shape)
            known.packed = PackedActivation(x, known.bits, known.k, self.verifier)
            self.dense_bytes += tensor.numel() * tensor.element_size()
            self.packed_bytes += known.packed.nbytes
        return known.packed, tensor.shape

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        packed, shape = saved
        return packed.expand().view(shape)


class _Known:
    """A TopK output by its memory; does not keep it alive."""

    def __init__(self, x: Tensor, bits: Tensor, k: int) -> None:
        self.shape, self.dtype, self.bits, self.k = x.shape, x.dtype, bits, k
        self._storage = StorageWeakRef(x.untyped_storage())
        self._version = x._version
        self.packed: PackedActivation | None = None

    def is_the_memory_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this output, whole and unchanged; a view of it counts."""
        return (
            tensor.dtype == self.dtype
            and tensor.numel() == self.shape.numel()
            and tensor.is_contiguous()
            and tensor._version == self._version
            and not self._storage.expired()
        )
