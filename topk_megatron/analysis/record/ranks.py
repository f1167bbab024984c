"""The ranks that share the work, under torchrun or alone."""

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among those that do the same command side by side."""

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def largest(self, seconds: float) -> float:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return seconds
        numbers: list[float | None] = [None] * self.world
        dist.all_gather_object(numbers, seconds)
        return max(number for number in numbers if number is not None)


def join_ranks() -> Ranks:
    """The ranks that torchrun started; a process on its own is rank 0 of 1."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        # A rank may finish its blocks hours before another.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return Ranks(dist.get_rank(), world)
