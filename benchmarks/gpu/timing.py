"""Times work on a GPU: graph replays between events, in turns, over buffers that no cache can hold.

A work is a function of the number of a buffer set. One graph runs the work once for every set, so
that by the time a set comes round again, the others have pushed it out of the L2 cache (50 MB on an
H100, 60 MB on an H200). The works of one call take turns: whatever slows the card down for a while
slows all of them.
"""

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[int], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one run of a work: the median, and the percentiles 10 and 90 of its repeats."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        """Summarise repeats."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        tenth, ninetieth = (ordered[round(share * last)] for share in (0.1, 0.9))
        return cls(statistics.median(ordered), tenth, ninetieth)


def captured(work: Work, sets: int) -> Callable[[], object]:
    """Return a function that runs the work once for each set, by replaying a graph if it can.

    Work that cannot be captured, because it waits for the device, is called directly instead.
    """
    for number in range(sets):  # compiles, loads and allocates what the first run needs
        work(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs: list[object] = []  # held until the capture ends, so that no two sets share an output
    try:
        with torch.cuda.graph(graph):
            outputs.extend(work(number) for number in range(sets))
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return lambda: [work(number) for number in range(sets)]
    return graph.replay


def measure(works: dict[str, Work], *, sets: int, repeats: int) -> dict[str, Times]:
    """Return the seconds of each work for one set, from repeats that take turns."""
    runs = {name: captured(work, sets) for name, work in works.items()}
    for run in runs.values():
        run()
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: Times.of([start.elapsed_time(end) / 1e3 / sets for start, end in pairs])
        for name, pairs in marks.items()
    }
