"""Sparse saved activations: autograd keeps a TopK output as its k values and S.

Full recompute keeps the input of every layer until its backward pass; without recompute, a norm
keeps its input. If that input is a TopK output, only k of its H numbers are worth keeping. Hooks on
autograd's saved tensors look up each tensor in the registry of selections. They keep one packed
form of each tensor it knows, however often that tensor is saved, and expand it on demand. Without
recompute, S is the bitmask that the TopK keeps for its own backward pass anyway.

The first layer's input is the embedding's output, which is dense. Its rows are already in the
embedding matrix, so the hooks keep only the token ids and repeat the lookup.

A pipeline stage also holds the hidden state that it received, because that tensor will carry the
gradient to send back. After the forward pass only the packed form is read, so the tensor's memory
is released and only its shape remains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topk_megatron.ops.library import OPS
from topk_megatron.parallel.selection import Memory, Selection, SelectionRegistry
from topk_megatron.parallel.verify import Verifier


class _Packed(ABC):
    """Replaces a dense tensor that autograd saved.

    Attributes:
        nbytes: size of the packed form in bytes.
    """

    nbytes: int

    def __init__(self, x: Tensor, verifier: Verifier) -> None:
        self._verifier = verifier
        self._dense = x.detach().clone() if verifier.active else None

    def expand(self) -> Tensor:
        """Return the dense tensor, bitwise; the first call in a verified step compares it."""
        x = self._rebuild()
        if self._dense is not None:
            self._verifier.check("saved activations", x, self._dense)
            self._dense = None
        return x

    @abstractmethod
    def _rebuild(self) -> Tensor: ...


class PackedActivation(_Packed):
    """A TopK output [..., H], kept as values [N, K] and the smaller of a bitmask and indices."""

    def __init__(self, selection: Selection, x: Tensor, verifier: Verifier) -> None:
        super().__init__(x, verifier)
        self._shape, self._k = selection.shape, selection.k
        rows_NH = x.detach().reshape(-1, self._shape[-1])
        indices_NK, bits_NW = selection.indices_NK(), selection.bits_NW
        # The transport keeps indices that came over the wire in any case.
        self._is_mask = bits_NW is not None and bits_NW.nbytes <= indices_NK.nbytes
        self._selection = bits_NW if bits_NW is not None and self._is_mask else indices_NK
        self._values_NK = OPS.gather_row(rows_NH, indices_NK)
        self.nbytes = self._values_NK.nbytes + self._selection.nbytes

    def _rebuild(self) -> Tensor:
        hidden_size, indices_NK = self._shape[-1], self._selection
        if self._is_mask:
            indices_NK = OPS.bits_to_indices(self._selection, hidden_size, self._k)
        return OPS.scatter_row(self._values_NK, indices_NK, hidden_size).view(self._shape)


class EmbeddedTokens(_Packed):
    """The embedding's output [s, b, H], kept as the token ids it came from.

    Every tensor-parallel rank must expand it, because the lookup may reduce over these ranks.
    """

    def __init__(
        self, lookup: Callable[[], Tensor], nbytes: int, x: Tensor, verifier: Verifier
    ) -> None:
        super().__init__(x, verifier)
        self.nbytes, self._lookup = nbytes, lookup

    def _rebuild(self) -> Tensor:
        with torch.no_grad():
            return self._lookup()


class _Embedding:
    """The embedding's output for this microbatch, and how to compute it again."""

    def __init__(self, x: Tensor, lookup: Callable[[], Tensor], nbytes: int) -> None:
        self.memory, self.shape = Memory(x), x.shape
        self.lookup, self.nbytes = lookup, nbytes
        self.packed: EmbeddedTokens | None = None


class SparseSaver:
    """Packs TopK and embedding outputs that autograd saves between `enter` and `leave`.

    Attributes:
        dense_bytes: size of the packed tensors in dense form, each counted once, in bytes.
        packed_bytes: size of their packed forms in bytes.
    """

    def __init__(self, selections: SelectionRegistry, verifier: Verifier) -> None:
        """Start with no tensor packed.

        Args:
            selections: registry of TopK outputs.
            verifier: compares packed with dense tensors in verified steps.
        """
        self.selections, self.verifier = selections, verifier
        selections.active = True
        self.dense_bytes = self.packed_bytes = 0
        self._hooks: Any = None
        self._received: Tensor | None = None
        self._embedding: _Embedding | None = None

    def remember_embedding(self, x: Tensor, lookup: Callable[[], Tensor], nbytes: int) -> None:
        """Announce the embedding's output to the next `enter`.

        Args:
            x: the output, [s, b, H].
            lookup: returns a tensor that equals `x` bitwise, until the weights change.
            nbytes: memory that `lookup` holds in bytes.
        """
        self._embedding = _Embedding(x, lookup, nbytes)

    def enter(self, received: Tensor | None = None) -> None:
        """Start packing saved tensors.

        Args:
            received: the hidden state from the previous stage; `leave` releases its memory if it
                was sent sparsely.
        """
        assert self._hooks is None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        if received is not None and self.selections.of(received) is not None:
            self._received = received

    def leave(self) -> None:
        """Stop packing; packed tensors still expand when the backward pass asks for them."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = self._embedding = None
        if self._received is not None:
            empty = self._received.detach().new_empty(1)
            self._received.data = empty.expand(self._received.shape)
            self._received = None

    def _pack(self, tensor: Tensor) -> Any:
        known: Selection | _Embedding | None = self.selections.of(tensor)
        if known is None:
            known = self._embedding
            if known is None or not known.memory.holds(tensor):
                return tensor
        if known.packed is None:
            x = tensor.detach().view(known.shape)
            if isinstance(known, Selection):
                known.packed = PackedActivation(known, x, self.verifier)
            else:
                known.packed = EmbeddedTokens(known.lookup, known.nbytes, x, self.verifier)
            self.dense_bytes += tensor.nbytes
            self.packed_bytes += known.packed.nbytes
        return known.packed, tensor.shape

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        packed, shape = saved
        return packed.expand().view(shape)
