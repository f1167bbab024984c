"""Counts what a process hands to its process groups: messages and bytes, by kind.

The methods of `torch.distributed.ProcessGroup` are what every send and collective of a backend goes
through, whatever function of torch or Megatron it began in.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Methods whose first tensor argument is what this rank contributes.
_KINDS = {"send": 0, "_allgather_base": 1, "allgather": 1}


class Traffic:
    """Bytes and messages since the count began, by kind (``send``, ``_allgather_base``, …)."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def add(self, kind: str, tensors: Any) -> None:
        """Note one call with what this rank contributes to it."""
        flat = [tensors] if isinstance(tensors, Tensor) else list(_flatten(tensors))
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in flat)
        self.messages[kind] += 1


def _flatten(tensors: Any) -> Iterator[Tensor]:
    for item in tensors:
        if isinstance(item, torch.Tensor):
            yield item
        else:
            yield from _flatten(item)


@contextlib.contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count all traffic of this process inside the ``with``."""
    traffic, group_class = Traffic(), dist.ProcessGroup
    originals = {kind: getattr(group_class, kind) for kind in _KINDS}

    def counting(kind: str, position: int) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            traffic.add(kind, args[position])
            return originals[kind](self, *args, **kwargs)

        return method

    for kind, position in _KINDS.items():
        setattr(group_class, kind, counting(kind, position))
    try:
        yield traffic
    finally:
        for kind, original in originals.items():
            setattr(group_class, kind, original)
