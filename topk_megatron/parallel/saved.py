"""Sparse saved activations: what autograd keeps of a TopK output is its k values and S.

Full recompute keeps the input of every layer until its backward pass, and without it a norm keeps
its input; where that is a TopK output, only k of H numbers are worth keeping. Hooks on autograd's
saved tensors recognise TopK outputs by their storage, keep the packed form (one, however often the
tensor is saved) and expand it when it is asked for. S is the bitmask that the TopK's own backward
keeps anyway when there is no recompute.

The first layer's input is the embedding's output, which is dense. Its rows stand in the embedding
matrix already, so that nothing of it is kept but the token ids: the lookup is done again.

A pipeline stage also holds the hidden state that it received, because its gradient will be asked of
that tensor. After the forward pass nobody reads it any more but through the packed form, so that
its memory is let go and only its shape stays.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from topk_megatron.ops.library import OPS
from topk_megatron.parallel.selection import INDICES
from topk_megatron.parallel.verify import Verifier


class _Packed(ABC):
    """What is kept in place of a dense tensor.

    Attributes:
        nbytes: memory of the packed form.
    """

    nbytes: int

    def __init__(self, x: Tensor, verifier: Verifier) -> None:
        self._verifier = verifier
        self._dense = x.detach().clone() if verifier.active else None

    def expand(self) -> Tensor:
        """The dense tensor, bitwise; compared with `x` the first time, in a verified step."""
        x = self._rebuild()
        if self._dense is not None:
            self._verifier.check("saved activations", x, self._dense)
            self._dense = None
        return x

    @abstractmethod
    def _rebuild(self) -> Tensor: ...


class PackedActivation(_Packed):
    """A TopK output [..., H] as values [N, K] and, whichever is smaller, a bitmask or indices."""

    def __init__(self, known: "_Known", x: Tensor, verifier: Verifier) -> None:
        super().__init__(x, verifier)
        self._shape, self._k = known.shape, known.k
        rows = x.detach().reshape(-1, known.shape[-1])
        indices = known.indices
        if indices is None:
            assert known.bits is not None
            bits = known.bits.reshape(rows.shape[0], -1)
            indices = OPS.bits_to_indices(bits, rows.shape[1], known.k)
            is_mask = bits.nbytes <= indices.nbytes
            self._selection, self._is_mask = (bits, True) if is_mask else (indices, False)
        else:  # the transport keeps them in any case
            self._selection, self._is_mask = indices, False
        self._values = OPS.gather_row(rows, indices)
        self.nbytes = self._values.nbytes + self._selection.nbytes

    def _rebuild(self) -> Tensor:
        hidden_size, indices = self._shape[-1], self._selection
        if self._is_mask:
            indices = OPS.bits_to_indices(self._selection, hidden_size, self._k)
        return OPS.scatter_row(self._values, indices, hidden_size).view(self._shape)


class EmbeddedTokens(_Packed):
    """The embedding's output [s, b, H] as the token ids that it came from.

    Every tensor-parallel rank expands it, for the lookup may reduce over them.
    """

    def __init__(
        self, lookup: Callable[[], Tensor], nbytes: int, x: Tensor, verifier: Verifier
    ) -> None:
        super().__init__(x, verifier)
        self.nbytes, self._lookup = nbytes, lookup

    def _rebuild(self) -> Tensor:
        with torch.no_grad():
            return self._lookup()


class SparseSaver:
    """Packs TopK outputs, and the embedding's, that autograd saves while the saver is entered.

    Attributes:
        dense_bytes: what the tensors that were packed would have taken, each counted once.
        packed_bytes: what their packed forms take.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.dense_bytes = self.packed_bytes = 0
        self._known: dict[int, _Known | _Embedded] = {}
        self._hooks: Any = None
        self._received: Tensor | None = None
        self._embedded: _Embedded | None = None

    def remember(self, x: Tensor, bits: Tensor, k: int) -> None:
        """Announce a TopK output, so that it is recognised when it is saved."""
        if self._hooks is not None:
            self._known[x.data_ptr()] = _Known(x, k, bits=bits.detach())

    def remember_embedding(self, x: Tensor, lookup: Callable[[], Tensor], nbytes: int) -> None:
        """Announce the embedding's output to the next `enter`.

        Args:
            x: [s, b, H], its output.
            lookup: gives a tensor that is bitwise equal to `x`, until the weights change.
            nbytes: memory that `lookup` holds on to.
        """
        self._embedded = _Embedded(x, lookup, nbytes)

    def enter(self, received: Tensor | None = None) -> None:
        """Begin to pack what is saved from here on.

        Args:
            received: what this stage received from the one before; let go of when it was sent
                sparsely, once the forward pass is over.
        """
        assert self._hooks is None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        if self._embedded is not None:
            self._known[self._embedded.address] = self._embedded
            self._embedded = None
        indices = getattr(received, INDICES, None)
        if received is not None and indices is not None:
            self._received = received
            known = _Known(received, indices.shape[-1], indices=indices)
            self._known[received.data_ptr()] = known

    def leave(self) -> None:
        """End packing; what was packed is expanded whenever the backward pass comes."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
            self._known.clear()
        if self._received is not None:
            empty = self._received.detach().new_empty(1)
            self._received.data = empty.expand(self._received.shape)
            self._received = None

    def _pack(self, tensor: Tensor) -> Any:
        known = self._known.get(tensor.data_ptr())
        if known is None or not known.is_the_memory_of(tensor):
            return tensor
        if known.packed is None:
            x = tensor.detach().view(known.shape)
            known.packed = known.pack(x, self.verifier)
            self.dense_bytes += tensor.numel() * tensor.element_size()
            self.packed_bytes += known.packed.nbytes
        return known.packed, tensor.shape

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        packed, shape = saved
        return packed.expand().view(shape)


class _Memory:
    """A tensor by its memory; does not keep it alive."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.address = x.shape, x.dtype, x.data_ptr()
        self.packed: _Packed | None = None
        self._storage = StorageWeakRef(x.untyped_storage())
        self._version = x._version

    def is_the_memory_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this one, whole and unchanged; a view of it counts."""
        return (
            tensor.dtype == self.dtype
            and tensor.numel() == self.shape.numel()
            and tensor.is_contiguous()
            and tensor._version == self._version
            and not self._storage.expired()
        )


class _Known(_Memory):
    """A TopK output, and what was selected."""

    def __init__(
        self, x: Tensor, k: int, bits: Tensor | None = None, indices: Tensor | None = None
    ) -> None:
        super().__init__(x)
        self.k, self.bits, self.indices = k, bits, indices

    def pack(self, x: Tensor, verifier: Verifier) -> PackedActivation:
        return PackedActivation(self, x, verifier)


class _Embedded(_Memory):
    """The embedding's output, and how to have it again."""

    def __init__(self, x: Tensor, lookup: Callable[[], Tensor], nbytes: int) -> None:
        super().__init__(x)
        self._lookup, self._nbytes = lookup, nbytes

    def pack(self, x: Tensor, verifier: Verifier) -> EmbeddedTokens:
        return EmbeddedTokens(self._lookup, self._nbytes, x, verifier)
