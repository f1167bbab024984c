"""The TopK activation of one layer, and how to read and change its output.

A layer's sparse hidden state is the output of its `TopKActivation`. `SparseStates` records it as
values and indices; an `Intervention` changes one neuron of it. The context managers of the model
(`sparse_states`, `intervene`) install both, and remove them when they end.

Shapes: b rows of a batch, s positions of one forward pass, H neurons, k survivors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .selection_topk import select, select_with_indices

OPERATIONS = ("set", "add", "scale", "ablate")
SITES = ("residual", "mlp")


@dataclass(frozen=True)
class Intervention:
    """A change of one neuron at one TopK layer, after the TopK; the rest stays bitwise equal.

    The changed state is not made sparse again: a neuron that did not survive can be switched on.

    Attributes:
        layer: number of the layer, from 0.
        neuron: coordinate of H (or of the MLP's intermediate size at the MLP site).
        op: ``set`` to the value, ``add`` it, ``scale`` by it, or ``ablate`` (set to 0).
        value: the number to set, add or scale by; None for ``ablate`` only.
        positions: change only these positions, counted from each row's first token that is not
            padding; they stay the same during generation with a cache. None is everywhere.
        tokens: change only positions whose input token is one of these.
        rows: change only these rows of the batch (with beams or several returned sequences, rows
            of the expanded batch).
        site: ``residual`` or ``mlp``.
    """

    layer: int
    neuron: int
    op: str = "set"
    value: float | None = None
    positions: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    site: str = "residual"

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"op must be one of {', '.join(OPERATIONS)}, got {self.op!r}")
        if self.site not in SITES:
            raise ValueError(f"site must be one of {', '.join(SITES)}, got {self.site!r}")
        if (self.value is None) != (self.op == "ablate"):
            needs = "takes no value" if self.op == "ablate" else "needs a value"
            raise ValueError(f"op {self.op!r} {needs}, got {self.value!r}")

    def changed(self, old: Tensor) -> Tensor:
        """Return the neuron's new values [b, s] from its old ones."""
        value = self.value or 0.0
        if self.op == "add":
            # Adding 0 must change nothing, and would turn -0 into +0.
            return old + value if value else old
        return old * value if self.op == "scale" else torch.full_like(old, value)


@dataclass
class Batch:
    """Tokens and positions of the running forward pass, set before each pass by `intervene`.

    Attributes:
        tokens: int64 [b, s]; None if the model was given embeddings.
        positions: int64 [b, s], from each row's first real token; negative on padding before it.
    """

    tokens: Tensor | None = None
    positions: Tensor | None = None

    def where(self, change: Intervention, like: Tensor) -> Tensor | None:
        """Return a mask [b, s] of the places that `change` is for; None is everywhere."""
        masks = []
        if change.positions is not None:
            wanted = torch.as_tensor(list(change.positions), device=like.device)
            masks.append(torch.isin(self._known(self.positions, like), wanted))
        if change.tokens is not None:
            if self.tokens is None:
                raise ValueError(
                    "an intervention on tokens needs input_ids, but the model was given "
                    "inputs_embeds; use positions"
                )
            wanted = torch.as_tensor(list(change.tokens), device=like.device)
            masks.append(torch.isin(self.tokens.to(like.device), wanted))
        if change.rows is not None:
            rows = torch.arange(like.shape[0], device=like.device).unsqueeze(1)
            wanted = torch.as_tensor(list(change.rows), device=like.device)
            masks.append(torch.isin(rows, wanted).expand(like.shape))
        return None if not masks else torch.stack(masks).all(dim=0)

    @staticmethod
    def _known(positions: Tensor | None, like: Tensor) -> Tensor:
        assert positions is not None, "the model's forward pass was not announced"
        return positions.to(like.device).expand(like.shape)


Reader = Callable[[int, Tensor, Tensor], None]


class TopKActivation(nn.Module):
    """Keeps the k largest of H coordinates; has no parameters.

    Attributes:
        layer: number of the layer, from 0; None in an expert, where rows are not positions.
        edits: interventions in force, in the order in which they are applied.
        readers: functions that take the layer, the output's values [b, s, n], and its indices
            int64 [b, s, n].
    """

    def __init__(self, layer: int | None, k: int, mode: str, groups: int | None = None) -> None:
        super().__init__()
        self.layer, self.k, self.mode, self.groups = layer, k, mode, groups or 1
        self.edits: list[tuple[Intervention, Batch]] = []
        self.readers: list[Reader] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return y [..., H] for x [..., H]."""
        if not self.edits and not self.readers:
            return self._flat(select(self._grouped(hidden_states), self._group_k, self.mode))
        y, indices = self._select_with_indices(hidden_states)
        mask = None
        if self.edits:
            mask = torch.zeros_like(y, dtype=torch.bool).scatter(-1, indices, True)
            y, mask = self._edit(y, mask)
        if self.readers:
            values, indices = _gather(y, indices, mask)
            for reader in self.readers:
                reader(self.layer or 0, values, indices)
        return y

    @property
    def _group_k(self) -> int:
        return self.k // self.groups

    def _grouped(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.unflatten(-1, (self.groups, -1))

    def _flat(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.flatten(-2)

    def _select_with_indices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, indices = select_with_indices(self._grouped(x), self._group_k, self.mode)
        if self.groups > 1:
            starts = torch.arange(self.groups, device=x.device) * (x.shape[-1] // self.groups)
            indices = (indices + starts.unsqueeze(-1)).flatten(-2)
        return self._flat(y), indices

    def _edit(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = y.clone()
        for change, batch in self.edits:
            old = y[..., change.neuron]
            where = batch.where(change, old)
            new = change.changed(old)
            y[..., change.neuron] = new if where is None else torch.where(where, new, old)
            mask[..., change.neuron] |= True if where is None else where
        return y, mask

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"layer={self.layer}, k={self.k}, mode={self.mode}{groups}"


def _gather(y: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values and indices of a state, with the neurons that interventions touched.

    Rows with fewer neurons than the widest row end in index -1 and value 0.
    """
    if mask is not None:
        counts = mask.sum(dim=-1, keepdim=True)
        width = int(counts.max())
        order = torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        order = order[..., :width]
        real = torch.arange(width, device=y.device) < counts
        values = torch.where(real, y.gather(-1, order), y.new_zeros(()))
        return values, torch.where(real, order, -1)
    return y.gather(-1, indices), indices


@dataclass(frozen=True)
class SparseState:
    """The hidden states of one layer.

    Attributes:
        values: [b, s, k], in the model's dtype; s runs over all forward passes in order.
        indices: int64 [b, s, k], the neurons that have these values, ascending. Under
            interventions a row can have more than k; shorter rows end in index -1 and value 0.
    """

    values: Tensor
    indices: Tensor

    def to_dense(self, size: int) -> Tensor:
        """Return the hidden state [b, s, size]."""
        dense = self.values.new_zeros((*self.values.shape[:-1], size + 1))
        return dense.scatter(-1, self.indices % (size + 1), self.values)[..., :size]


class SparseStates(Mapping[int, SparseState]):
    """A recording of the TopK layers' outputs, by layer number."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def read(self, layer: int, values: Tensor, indices: Tensor) -> None:
        """Record one forward pass, without its graph."""
        self._parts[layer].append((values.detach(), indices))

    def clear(self) -> None:
        """Forget the recording, so that a long run does not fill the memory."""
        for parts in self._parts.values():
            parts.clear()

    def __getitem__(self, layer: int) -> SparseState:
        if layer not in self._parts:
            raise KeyError(
                f"layer {layer} was not recorded; recorded layers are {list(self._parts)}"
            )
        parts = self._parts[layer]
        if not parts:
            raise KeyError(f"layer {layer} has no recording yet; run the model inside the context")
        width = max(indices.shape[-1] for _, indices in parts)
        padded = [_widen(values, indices, width) for values, indices in parts]
        values, indices = (torch.cat(column, dim=1) for column in zip(*padded, strict=True))
        return SparseState(values, indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _widen(values: Tensor, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    missing = (0, width - indices.shape[-1])
    return nn.functional.pad(values, missing), nn.functional.pad(indices, missing, value=-1)


@contextmanager
def installed(lists: Sequence[tuple[list[Any], Any]]) -> Iterator[None]:
    """Append each item to its list, and remove exactly these items at the end."""
    for target, item in lists:
        target.append(item)
    try:
        yield
    finally:
        for target, item in lists:
            del target[next(i for i, other in enumerate(target) if other is item)]
