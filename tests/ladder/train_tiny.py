"""Trains and measures a run that is small enough for tests.

python -m tests.ladder.train_tiny DIRECTORY TEXT VARIANT
"""

import sys
from pathlib import Path

from examples.ladder import grid, measure, rungs, training
from examples.ladder.text import prepare

DEPTH = 3  # H = 96, and one TopK layer


def make_run(directory: Path, variant: str) -> grid.Run:
    """Return a run of 160 steps of 512 tokens."""
    rungs.RUNGS[DEPTH] = rungs.Rung(DEPTH, batch=2, ratio=1)
    (run,) = grid.make_grid(directory, "text", [DEPTH], [variant], [1])
    return run


def main() -> None:
    """Train and measure it, or continue."""
    directory, text = Path(sys.argv[1]), sys.argv[2]
    data = prepare([text], [text], directory / "data")
    run = make_run(directory, sys.argv[3])
    results = directory / "results"
    training.train_all([run], data, 1, lambda one: measure.measure(one, data, results))


if __name__ == "__main__":
    main()
