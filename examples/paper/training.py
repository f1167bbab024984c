"""Trains the runs, several at a time; skips those that are trained already."""

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
CHECKPOINTS = 6  # per run; the analysis follows neurons over them


@dataclass(frozen=True)
class Data:
    """The data, as the quickstart makes it.

    Attributes:
        dataset: The prefix of the dataset.
        tokenizer: The tokenizer.
    """

    dataset: Path
    tokenizer: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that training reads."""
        return Path(f"{self.dataset}.bin"), Path(f"{self.dataset}.idx"), self.tokenizer


def train_all(runs: Sequence[Run], data: Data, jobs: int) -> None:
    """Train the missing runs; if one fails, exit and name its log."""
    missing = [run for run in runs if not is_trained(run)]
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} models are trained already", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(lambda run: _train(run, data), missing):
            print(done, flush=True)


def is_trained(run: Run) -> bool:
    """Return whether the run is complete."""
    return (run.directory / "trained.json").exists()


def _train(run: Run, data: Data) -> str:
    """Train one model in one process with one thread.

    An interrupted run starts from scratch: it takes minutes only, whereas the optimizer's state
    would add twice the model's 30 MB to every checkpoint.
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
