"""Runs the whole analysis on the centre of the grid and its dense twin, once for each seed."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import Run
from measure import HELD_OUT, LAYERS_OF_DENSE, folder_of

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Amounts:
    """How much text and how many neurons are analysed.

    Attributes:
        tokens: Tokens recorded for each model.
        tracked: Tokens recorded for each checkpoint.
        trained: Tokens that each SAE is trained on.
        neurons: Neurons per layer whose contexts are embedded.
        steered: Neurons per layer that are steered.
        samples: Texts that each push continues.
    """

    tokens: int
    tracked: int
    trained: int
    neurons: int
    steered: int
    samples: int


FULL = Amounts(65536, 32768, 300_000, 48, 12, 6)
FAST = Amounts(8192, 8192, 20480, 8, 2, 2)


def study_pair(topk: Run, dense: Run, dataset: Path, directory: Path, amounts: Amounts) -> Path:
    """Study two models of one seed, unless the same study exists.

    Returns:
        The study's folder, with claims.json and report.html.
    """
    key = f"{topk.directory.name}+{dense.directory.name}"
    study = directory / f"study-{key}"
    marker = study / "commands.json"
    commands = _commands(topk, dense, dataset, study, amounts)
    if marker.exists() and json.loads(marker.read_text()) == commands:
        return study
    shutil.rmtree(study, ignore_errors=True)
    shutil.rmtree(_trajectory(topk), ignore_errors=True)
    study.mkdir(parents=True)
    with (study / "log.txt").open("w") as log:
        for command in commands:
            print(f"studying {topk.name}: {' '.join(command[:2])}", flush=True)
            whole = [sys.executable, str(REPOSITORY / "tools" / command[0]), *command[1:]]
            if subprocess.run(whole, stdout=log, stderr=log, cwd=REPOSITORY).returncode:
                sys.exit(f"error: {command[0]} {command[1]} failed; its output is in {log.name}")
    marker.write_text(json.dumps(commands))
    return study


def _trajectory(run: Run) -> Path:
    return run.directory / "hf-trajectory"


def _commands(
    topk: Run, dense: Run, dataset: Path, study: Path, amounts: Amounts
) -> list[list[str]]:
    k = topk.k
    where = ("--corpus", dataset, "--study", study, f"--documents={HELD_OUT}")
    tokens = (*where, "--max-tokens", amounts.tokens)
    models = {run.variant: ("--model", folder_of(run)) for run in (topk, dense)}
    middle = f"iter_{topk.steps // 2:07d}"
    commands: list[tuple[Any, ...]] = [
        (
            *("convert_checkpoint.py", "to-hf", "--all-iterations"),
            *("--load", topk.directory / "checkpoints", "--save", _trajectory(topk)),
        ),
        ("analyze.py", "record", *models["topk"], *tokens, "--name", "topk"),
        (
            *("analyze.py", "record", *models["dense"], *tokens),
            *("--name", "dense", "--k", k, "--layers", LAYERS_OF_DENSE),
        ),
        (
            *("analyze.py", "track", *where, "--max-tokens", amounts.tracked, "--name", "topk"),
            *("--trajectory", _trajectory(topk), "--context-neurons", amounts.neurons),
        ),
        (
            *("analyze.py", "sae", *models["dense"], *tokens, "--train-documents=:-4"),
            *("--k", k, "--layers", 2, "--train-tokens", amounts.trained),
            *("--checkpoints", f"topk@{middle}", f"topk@iter_{topk.steps:07d}"),
        ),
        (
            *("analyze.py", "entropy", "--study", study, "--runs", "topk", "dense", "sae-seed-0"),
            *("--semantic-neurons", amounts.neurons),
        ),
        (
            *("analyze.py", "steer", *models["topk"], *where, "--run", "topk"),
            *("--sample", amounts.steered, "--samples", amounts.samples),
            *("--strengths", 0.5, 1, 2, 4),
        ),
        ("analyze.py", "report", "--study", study),
    ]
    return [[str(word) for word in command] for command in commands]
