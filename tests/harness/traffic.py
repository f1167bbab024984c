"""Counts the messages and bytes that a process passes to its process groups, by kind.

Every send and collective goes through a method of `torch.distributed.ProcessGroup`, whichever
function of torch or Megatron started it.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Maps each method to its kind and to the position of the argument that this rank contributes.
# torch 2.14 renamed the gather into one tensor.
_METHODS = {
    "send": ("send", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
}


class Traffic:
    """Counts of bytes and messages, by kind (``send``, ``all_gather``)."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def add(self, kind: str, tensors: Any) -> None:
        """Count one call and the tensors that this rank contributes to it."""
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
    # Keep the descriptors themselves: a method read from the class would not bind once restored.
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
