"""Trains the runs, several at a time. A stopped training continues at its last checkpoint."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.ladder.grid import Leg, Run
from examples.ladder.text import REPOSITORY, Data
from topk_megatron.checkpoint.directory import TRACKER

SAVES = 40  # checkpoints of a training; every eighth is kept, and branches start from two of them
KEPT = 8
LOG_INTERVAL = 20
# Steps allocate and free the same hundreds of megabytes; returning them to the system each time
# costs a tenth of the step.
_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def train_all(runs: Sequence[Run], data: Data, jobs: int, then: Callable[[Run], None]) -> None:
    """Train what is missing, and call `then` for each run; if one fails, exit and name its log."""

    def work(run: Run) -> None:
        if not is_trained(run):
            print(train(run, data), flush=True)
        then(run)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, runs))


def is_trained(run: Run) -> bool:
    """Return whether the run and its branches are complete."""
    return all((leg.directory / "trained.json").exists() for leg in run.legs())


def train(run: Run, data: Data) -> str:
    """Train one model and its branches, in one process at a time with one thread."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "flags.args").write_text(f"# {run.about}\n" + "\n".join(run.flags) + "\n")
    for leg in run.legs():
        if not (leg.directory / "trained.json").exists():
            _train_leg(leg, data)
    seconds = sum(seconds_of(leg) for leg in run.legs())
    return f"trained {run.name} in {seconds:.0f} s"


def seconds_of(leg: Leg) -> float:
    """Return the seconds that a leg's steps took, from its log; a step done twice counts twice."""
    log = (leg.directory / "train.log").read_text()
    seconds, before = 0.0, 0
    for step, time in re.findall(r"iteration +(\d+)/.*?per iteration \(ms\): ([\d.]+)", log):
        # A process that has just started reports its first step alone.
        steps = int(step) - before if before < int(step) <= before + LOG_INTERVAL else 1
        seconds, before = seconds + steps * float(time) / 1000, int(step)
    return seconds


def _train_leg(leg: Leg, data: Data) -> None:
    leg.directory.mkdir(exist_ok=True)
    command = [
        *(sys.executable, str(REPOSITORY / "pretrain_topk_gpt.py"), *leg.run.flags),
        *leg.schedule(),
        *data.flags(str(leg.run.rung.depth)),
        *("--tensorboard-dir", str(leg.directory / "tensorboard"), "--tensorboard-log-interval"),
        "1",
        *("--log-interval", str(LOG_INTERVAL)),
        *_checkpoints(leg),
    ]
    run_on_one_thread(command, leg.directory / "train.log", f"training {leg.run.name}")
    done = {"seconds": round(seconds_of(leg), 1)}
    (leg.directory / "trained.json").write_text(json.dumps(done))


def run_on_one_thread(command: Sequence[str], log: Path, what: str) -> None:
    """Run a training whose output is appended to a log; if it fails, exit and name both."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **_ALLOCATOR}
    with log.open("a") as output:
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
        ).returncode
    if code:
        sys.exit(f"error: {what} failed; its output is in {log}")


def _checkpoints(leg: Leg) -> list[str]:
    """Return the flags that save checkpoints, and load the one to start from.

    A branch is short: it saves its end only, and starts again where it was stopped.
    """
    whole = leg.run.legs()[0]
    save = ["--save", str(leg.checkpoints)]
    if leg.fraction < 1:
        start = str(leg.steps - leg.cooldown)
        load = ["--load", str(whole.checkpoints), "--ckpt-step", start]
        interval = ["--save-interval", str(leg.steps)]
        return [*save, *interval, *load, "--override-opt-param-scheduler"]
    every = leg.steps // SAVES
    interval = ["--save-interval", str(every), "--save-retain-interval", str(KEPT * every)]
    resume = ["--load", str(leg.checkpoints)] if (leg.checkpoints / TRACKER).exists() else []
    return [*save, *interval, *resume]
