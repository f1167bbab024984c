"""Computes numbers with intervals from the measures of single runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grid import SEEDS, Run

from topk_megatron.analysis.measures import Interval, difference_interval, mean_interval

RESAMPLES = 2000
Measures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gap:
    """How far a variant's perplexity is above the dense twin's.

    Attributes:
        loss: Mean held-out loss over the seeds, in nats per token.
        percent: Percent of perplexity above dense, with an interval from resampled windows of text.
        seeds: The same for each seed alone; the interval does not cover their spread.
    """

    loss: float
    percent: Interval
    seeds: list[float]


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each variant in the order of their seeds."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return found


def gap(variant: Sequence[Run], dense: Sequence[Run], measures: Measures) -> Gap:
    """Compare a variant with its dense twin on the same windows, seed by seed.

    Raises:
        SystemExit: If the models were measured on different text.
    """
    counts = np.asarray(measures[dense[0].name]["counts"], float)
    one = np.stack([measures[run.name]["losses"] for run in variant])
    other = np.stack([measures[run.name]["losses"] for run in dense])
    if one.shape != other.shape:
        raise SystemExit(
            "error: models were measured on different text; delete their measures.json"
        )
    excess = (one - other).mean(0)
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = excess[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Gap(
        loss=float(one.sum() / (counts.sum() * len(variant))),
        percent=Interval(
            _percent(excess.sum() / counts.sum()), _percent(low), _percent(high), len(counts)
        ),
        seeds=[_percent(difference) for difference in (one - other).sum(1) / counts.sum()],
    )


def _percent(nats: float) -> float:
    return 100 * (math.exp(nats) - 1)


def token_entropies(runs: Sequence[Run], measures: Measures, k: int, layer: int | None) -> Any:
    """Return token entropies, in bits, of one layer's neurons (None: of all), over all seeds."""
    values: list[float] = []
    for run in runs:
        for place, found in measures[run.name]["neurons"].items():
            at_k, at_layer = map(int, place.split("/"))
            if at_k == k and layer in (None, at_layer):
                values += found["token_entropy"]
    return np.asarray(values, float)


def entropy(runs: Sequence[Run], measures: Measures, k: int, layer: int | None = None) -> Any:
    """Return the mean token entropy with its interval."""
    return mean_interval(token_entropies(runs, measures, k, layer), resamples=RESAMPLES)


def entropy_difference(
    one: Sequence[Run], other: Sequence[Run], measures: Measures, k: int
) -> Interval | None:
    """Return the difference of mean token entropies over all layers, in bits."""
    return difference_interval(
        token_entropies(one, measures, k, None),
        token_entropies(other, measures, k, None),
        resamples=RESAMPLES,
    )


def layers_of(runs: Sequence[Run], measures: Measures, k: int) -> list[int]:
    """Return the layers that were recorded at k."""
    places = measures[runs[0].name]["neurons"]
    return sorted(int(p.split("/")[1]) for p in places if int(p.split("/")[0]) == k)


def silent(runs: Sequence[Run], measures: Measures, k: int) -> float:
    """Return the mean share of neurons that never fired on the recorded text."""
    shares = [
        found["silent"]
        for run in runs
        for place, found in measures[run.name]["neurons"].items()
        if int(place.split("/")[0]) == k
    ]
    return float(np.mean(shares))


def score(runs: Sequence[Run], measures: Measures, task: str) -> tuple[float, float]:
    """Return accuracy and its standard error, over the seeds."""
    entries = [measures[run.name]["tasks"][task] for run in runs]
    error = math.sqrt(sum(entry["acc_stderr"] ** 2 for entry in entries)) / len(entries)
    return float(np.mean([entry["acc"] for entry in entries])), error


def seeds_text(values: Sequence[float]) -> str:
    """Return the values of single seeds as text for a table."""
    return " / ".join(f"{value:+.1f}" for value in values[: len(SEEDS)])
