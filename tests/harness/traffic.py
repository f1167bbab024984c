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

# Methods, the kind that they are counted as, and the argument with what this rank contributes.
# Gathers into one tensor have another name since torch 2.14.
_METHODS = {
    "send": ("send", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
}


class Traffic:
    """Bytes and messages since the count began, by kind (``send``, ``all_gather``)."""

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
    # The descriptors themselves: a method fetched from the class would not bind when put back.
    originals = {name: vars(group_class)[name] for name in _METHODS if name in vars(group_class)}

    def counting(name: str) -> Any:
        kind, position = _METHODS[name]

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            traffic.add(kind, args[position])
            return originals[name].__get__(self)(*args, **kwargs)

        return method

    for name in originals:
        setattr(group_class, name, counting(name))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(group_class, name, original)
