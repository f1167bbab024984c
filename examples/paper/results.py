"""Writes RESULTS.md: claims, tables and plots, with every number taken from the runs."""

import platform
from collections.abc import Iterable, Sequence
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


def write_results(
    runs: Sequence[Run], measures: Measures, studies: Sequence[Path], target: Path, command: str
) -> Path:
    """Write the page and its pictures.

    Args:
        runs: The trained runs.
        measures: Their measures by name.
        studies: Folders of the studies.
        target: The folder to write to.
        command: The command that the page names as its source.

    Returns:
        The page.
    """
    variants = by_variant(runs)
    images = target / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_gaps(variants, measures, images / "gap.png")
    plot_entropy(variants, measures, images / "entropy.png")
    plot_training(variants, measures, images / "training.png")
    parts = [
        _head(runs, command),
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


def _head(runs: Sequence[Run], command: str) -> str:
    import torch

    tokens = int(runs[0].flag("--train-iters")) * int(runs[0].flag("--global-batch-size"))
    tokens *= int(runs[0].flag("--seq-length"))
    seeds = len({run.seed for run in runs})
    warning = "" if "fast" not in command else _FAST_WARNING
    return f"""# The paper at laptop scale: results

{warning}Written by `{command}`; do not edit. {len(runs)} models of 6 layers and H = 256
were trained on {tokens:,} tokens of Shakespeare each,
with {seeds} {"seeds" if seeds > 1 else "seed"} per variant, and measured on plays that
none has seen. Each used one {platform.machine()} core and torch {torch.__version__}.

Square brackets are 95 % intervals: over windows of text for perplexity, over neurons for entropies,
over neurons or samples elsewhere. There are too few seeds for an interval over them; where they
are listed, their spread is part of the result.
"""


_FAST_WARNING = """**These models trained for a few steps only. The page shows that every part runs;
no number or verdict on it means anything.**

"""


def _section(title: str, text: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a heading, some text and a table."""
    lines = [_cells(head), f"|{'---|' * len(head)}", *map(_cells, rows)]
    return f"## {title}\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _claims(found: Sequence[Row]) -> str:
    text = (
        "Where there are several seeds, each has an entry, separated by semicolons. *Undecided*\n"
        "means that the interval of the difference contains zero, or that the seeds disagree."
    )
    cells = ((row.claim, f"**{row.verdict}**", row.number) for row in found)
    return _section("The paper's claims", text, ("claim", "here", "number"), cells)


def _perplexity(variants: dict[str, list[Run]], measures: Measures) -> str:
    head = ("variant", "what it is", "held-out loss, nats", "perplexity above dense, %")
    cells = []
    for name, runs in variants.items():
        found = gap(runs, variants["dense"], measures)
        above = ("-", "-")
        if name != "dense":
            above = (text_of(found.percent, 1), seeds_text(found.seeds))
        cells.append((name, runs[0].about, f"{found.loss:.3f}", *above))
    picture = "![Perplexity above the dense twin, by variant](images/gap.png)"
    return _section(
        "Perplexity compared with the dense twin", picture, (*head, "each seed, %"), cells
    )


def _neurons(variants: dict[str, list[Run]], measures: Measures) -> str:
    text = (
        "Mean token entropy in bits of the neurons with at least 50 activations, over all layers\n"
        "recorded. The dense twin's is that of its k largest neurons, at the same k, in its first\n"
        "four layers. Silent is the share of neurons that never fired on the recorded text. With\n"
        "a TopK inside the MLP, the residual stream is dense and is recorded like the twin's."
    )
    head = ("variant", "k", "token entropy", "dense at this k", "silent", "dense, silent")
    cells = []
    for name, runs in variants.items():
        if name == "dense":
            continue
        k, pair = runs[0].k, (runs, variants["dense"])
        entropies = (text_of(entropy(some, measures, k)) for some in pair)
        shares = (f"{100 * silent(some, measures, k):.1f} %" for some in pair)
        cells.append((name, str(k), *entropies, *shares))
    return _section("Neurons", text, head, cells)


def _layers(variants: dict[str, list[Run]], measures: Measures) -> str:
    k = variants["topk"][0].k
    cells = [
        (
            str(layer),
            *(text_of(entropy(variants[n], measures, k, layer)) for n in ("topk", "dense")),
        )
        for layer in layers_of(variants["topk"], measures, k)
    ]
    picture = "![Token entropy by layer, TopK and dense](images/entropy.png)"
    return _section("Token entropy by layer", picture, ("layer", "TopK", "dense"), cells)


def _task_scores(variants: dict[str, list[Run]], measures: Measures) -> str:
    tasks = sorted(measures[variants["dense"][0].name]["tasks"])
    text = "Accuracy ± standard error on examples from held-out plays; 0.25 is chance."
    cells = []
    for name, runs in variants.items():
        scores = (score(runs, measures, task) for task in tasks)
        cells.append((name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in scores)))
    return _section("Tasks", text, ("variant", *tasks), cells)
