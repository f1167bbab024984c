"""Writes RESULTS.md: claims, tables and plots, every number from the runs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claims import Row, rows, text_of
from compare import (
    Measures,
    by_variant,
    entropy,
    gap,
    layers_of,
    score,
    seeds_text,
    silent,
)
from grid import Run
from plots import plot_entropy, plot_gaps, plot_training


@dataclass(frozen=True)
class Facts:
    """What the head of the page says.

    Attributes:
        command: that made the page.
        seconds: of this run of it; what was cached is not in it.
        training_seconds: of all training runs together.
    """

    command: str
    seconds: float
    training_seconds: float


def write_results(
    runs: Sequence[Run], measures: Measures, studies: Sequence[Path], target: Path, facts: Facts
) -> Path:
    """Write the page and its pictures into the folder `target`; returns the page."""
    variants = by_variant(runs)
    images = target / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_gaps(variants, measures, images / "gap.png")
    plot_entropy(variants, measures, images / "entropy.png")
    plot_training(variants, measures, images / "training.png")
    parts = [
        _head(runs, facts),
        _claims(rows(variants, measures, studies)),
        _perplexity(variants, measures),
        _neurons(variants, measures),
        _layers(variants, measures),
        _task_scores(variants, measures),
        "## Training\n\n![Training loss of the variants](images/training.png)\n",
    ]
    page = target / "RESULTS.md"
    page.write_text("\n".join(parts))
    return page


def _head(runs: Sequence[Run], facts: Facts) -> str:
    import torch

    tokens = int(runs[0].flag("--train-iters")) * int(runs[0].flag("--global-batch-size"))
    tokens *= int(runs[0].flag("--seq-length"))
    seeds = len({run.seed for run in runs})
    warning = "" if "fast" not in facts.command else _FAST_WARNING
    return f"""# The paper at laptop scale: results

{warning}Written by `{facts.command}`; do not edit. {len(runs)} models of 6 layers and H = 256
trained on {tokens:,} tokens of Shakespeare each, {seeds} {"seeds" if seeds > 1 else "seed"} a
variant, measured on plays that none has seen. {os.cpu_count()} CPUs, {platform.machine()}, torch
{torch.__version__}; training took {facts.training_seconds / 60:.0f} minutes of one core, this run
of the command {facts.seconds / 60:.0f} minutes.

Square brackets are 95 % intervals: over windows of text for perplexity, over neurons for entropies,
over neurons or samples elsewhere. Seeds are too few for an interval over them; where they are
listed, their spread is part of the result.
"""


_FAST_WARNING = """**A few steps of training only: the page shows that every part runs, and no
number or verdict on it means anything.**

"""


def _claims(found: Sequence[Row]) -> str:
    lines = [
        "## The paper's claims\n",
        "One entry a seed where there are several, separated by semicolons. *Undecided*: the",
        "interval of the difference contains zero, or the seeds disagree.\n",
        "| claim | here | number |\n|---|---|---|",
    ]
    lines += [f"| {row.claim} | **{row.verdict}** | {row.number} |" for row in found]
    return "\n".join(lines) + "\n"


def _perplexity(variants: dict[str, list[Run]], measures: Measures) -> str:
    lines = [
        "## Perplexity beside the dense twin\n",
        "![Perplexity above the dense twin, by variant](images/gap.png)\n",
        "| variant | what it is | held-out loss, nats | perplexity above dense, % | each seed, % |",
        "|---|---|---|---|---|",
    ]
    for name, runs in variants.items():
        found = gap(runs, variants["dense"], measures)
        percent = "-" if name == "dense" else text_of(found.percent, 1)
        seeds = "-" if name == "dense" else seeds_text(found.seeds)
        lines.append(f"| {name} | {runs[0].about} | {found.loss:.3f} | {percent} | {seeds} |")
    return "\n".join(lines) + "\n"


def _neurons(variants: dict[str, list[Run]], measures: Measures) -> str:
    lines = [
        "## Neurons\n",
        "Mean token entropy in bits of the neurons with at least 50 activations, of all recorded",
        "layers; beside it the dense twin's, of its k largest neurons at the same k and its first",
        "four layers. Silent: share of neurons that never fired on the recorded text. With the",
        "TopK inside the MLP the residual stream is dense and is recorded as the twin's is.\n",
        "| variant | k | token entropy | dense at this k | silent | dense, silent |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in variants.items():
        if name == "dense":
            continue
        k = runs[0].k
        own, twin = (entropy(some, measures, k) for some in (runs, variants["dense"]))
        shares = [100 * silent(some, measures, k) for some in (runs, variants["dense"])]
        lines.append(
            f"| {name} | {k} | {text_of(own)} | {text_of(twin)} | {shares[0]:.1f} % | "
            f"{shares[1]:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def _layers(variants: dict[str, list[Run]], measures: Measures) -> str:
    k = variants["topk"][0].k
    lines = [
        "## Token entropy by layer\n",
        "![Token entropy by layer, TopK and dense](images/entropy.png)\n",
        "| layer | TopK | dense |\n|---|---|---|",
    ]
    for layer in layers_of(variants["topk"], measures, k):
        own, twin = (entropy(variants[n], measures, k, layer) for n in ("topk", "dense"))
        lines.append(f"| {layer} | {text_of(own)} | {text_of(twin)} |")
    return "\n".join(lines) + "\n"


def _task_scores(variants: dict[str, list[Run]], measures: Measures) -> str:
    tasks = sorted(measures[variants["dense"][0].name]["tasks"])
    lines = [
        "## Tasks\n",
        "Accuracy ± standard error, of examples from held-out plays; 0.25 is chance.\n",
        f"| variant | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}",
    ]
    for name, runs in variants.items():
        scores = (score(runs, measures, task) for task in tasks)
        cells = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in scores)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"
