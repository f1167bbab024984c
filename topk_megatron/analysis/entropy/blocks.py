"""Intervals of token entropies over the text: the bootstrap resamples blocks of the corpus.

Resampling with replacement repeats tokens, which lowers an entropy's estimate; the interval is
therefore the estimate ± z standard deviations of the replicates, not their percentiles.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from topk_megatron.analysis.measures import (
    Interval,
    block_replicates,
    corrected_entropy,
    normal_interval,
)
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import ALL_LAYERS, interval_columns

if TYPE_CHECKING:
    from topk_megatron.analysis.entropy.run import EntropyConfig

_RESAMPLES = 100
_FEWEST_BLOCKS = 8
_COLUMNS = ("layer", "neuron", "block", "token", "count")


@dataclass
class BlockRows:
    """Rows of entropy/summary.parquet and entropy/differences.parquet."""

    summary: list[dict[str, Any]]
    differences: list[dict[str, Any]]


def block_intervals(config: "EntropyConfig", runs: list[Run]) -> BlockRows:
    """Measure the mean token entropy of each run's sampled neurons over resampled blocks.

    A corpus of fewer than 8 blocks has no such interval. Runs of equal blocks are resampled alike,
    so that a difference compares the same text.
    """
    found: dict[str, tuple[float, np.ndarray]] = {}
    summary = []
    for run in runs:
        if run.manifest["blocks"] < _FEWEST_BLOCKS or not run.tables["blocks"].num_rows:
            continue
        value, replicates, neurons = _run_replicates(
            config, run, _weights(config, run.manifest["blocks"])
        )
        if neurons:
            found[run.name] = value, replicates
            interval = normal_interval(value, replicates, config.confidence, neurons)
            summary.append(
                {
                    "run": run.name,
                    "kind": run.kind,
                    "layer": ALL_LAYERS,
                    "measure": "token_entropy",
                    **interval_columns(interval),
                    "resampled": "blocks",
                }
            )
    return BlockRows(summary, _differences(config, runs, found))


def _differences(
    config: "EntropyConfig", runs: list[Run], found: dict[str, tuple[float, np.ndarray]]
) -> list[dict[str, Any]]:
    """Subtract from the first run each other one of equal blocks: both drew the same text."""
    rows, first = [], runs[0]
    for run in runs[1:]:
        same = run.manifest["block_tokens"] == first.manifest["block_tokens"]
        if not same or first.name not in found or run.name not in found:
            continue
        (one, resampled), (other, others) = found[first.name], found[run.name]
        interval = normal_interval(one - other, resampled - others, config.confidence, 0)
        rows.append(
            difference_row("token_entropy", ALL_LAYERS, first.name, run.name, "blocks", interval)
        )
    return rows


def difference_row(
    measure: str, layer: int, run_a: str, run_b: str, resampled: str, interval: Interval
) -> dict[str, Any]:
    """Return a row of entropy/differences.parquet."""
    return {
        "measure": measure,
        "layer": layer,
        "run_a": run_a,
        "run_b": run_b,
        "resampled": resampled,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
    }


def _weights(config: "EntropyConfig", blocks: int) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=_RESAMPLES)


def _run_replicates(
    config: "EntropyConfig", run: Run, weights: np.ndarray
) -> tuple[float, np.ndarray, int]:
    """Return the mean entropy, its replicates, and the number of neurons."""
    table = run.tables["blocks"]
    layer, neuron, block, token, counts = (table[n].to_numpy() for n in _COLUMNS)
    owner = layer.astype(np.int64) * run.width + neuron
    pairs, inverse = np.unique(owner * run.vocab_size + token, return_inverse=True)
    owners, groups = np.unique(pairs // run.vocab_size, return_inverse=True)
    total = np.bincount(np.searchsorted(owners, owner), weights=counts)
    active = total >= config.min_count

    def mean_entropy(pair_counts: np.ndarray) -> float:
        real = pair_counts > 0
        bits = corrected_entropy(pair_counts[real], groups[real], len(owners))
        return float(np.nanmean(bits[active]))

    if not active.any():
        return np.nan, np.zeros(len(weights)), 0
    value = mean_entropy(np.bincount(inverse, weights=counts))
    replicates = block_replicates(counts, block, inverse, mean_entropy, weights)
    return value, replicates, int(active.sum())
