"""Trains the runs, two at a time; what is trained already is left alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from grid import Run

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = 6  # of each run; the analysis follows neurons over them


@dataclass(frozen=True)
class Data:
    """Dataset prefix and tokenizer, as the quickstart makes them."""

    dataset: Path
    tokenizer: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that the models read."""
        return Path(f"{self.dataset}.bin"), Path(f"{self.dataset}.idx"), self.tokenizer


def train_all(runs: Sequence[Run], data: Data, jobs: int) -> None:
    """Train what is missing; ends the program if a run fails, with its log's name."""
    missing = [run for run in runs if not is_trained(run)]
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} models are trained already", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(lambda run: _train(run, data), missing):
            print(done, flush=True)


def is_trained(run: Run) -> bool:
    """Whether the run came to its end."""
    return (run.directory / "trained.json").exists()


def _train(run: Run, data: Data) -> str:
    """Train one model in one process with one thread.

    A run takes minutes and is begun anew when it was cut short; the model is only 30 MB and its
    optimizer's state would be twice that at every checkpoint.
    """
    shutil.rmtree(run.directory, ignore_errors=True)
    run.directory.mkdir(parents=True)
    (run.directory / "flags.args").write_text(f"# {run.about}\n" + "\n".join(run.flags) + "\n")
    every = max(1, run.steps // CHECKPOINTS)
    command = [
        *(sys.executable, str(REPOSITORY / "pretrain_topk_gpt.py"), *run.flags),
        *("--data-path", str(data.dataset)),
        *("--data-cache-path", str(run.directory / "index-cache")),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(data.tokenizer)),
        *("--save", str(run.directory / "checkpoints"), "--save-interval", str(every)),
        *("--no-save-optim", "--no-save-rng"),
        *("--tensorboard-dir", str(run.directory / "tensorboard"), "--tensorboard-log-interval"),
        "1",
    ]
    started = time.perf_counter()
    log = run.directory / "train.log"
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
        ).returncode
    if code:
        sys.exit(f"error: training {run.name} failed; its output is in {log}")
    seconds = time.perf_counter() - started
    (run.directory / "trained.json").write_text(json.dumps({"seconds": round(seconds, 1)}))
    return f"trained {run.name} in {seconds:.0f} s"
