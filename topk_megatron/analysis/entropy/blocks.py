"""Intervals of token entropies over the text: the bootstrap resamples blocks of the corpus.

Resampling with replacement repeats tokens, which lowers an entropy's estimate; the interval is
therefore the estimate ± z standard deviations of the replicates, and not their percentiles.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from topk_megatron.analysis.measures import block_replicates, corrected_entropy, normal_interval
from topk_megatron.analysis.study import Run

_RESAMPLES = 100
_FEWEST_BLOCKS = 8
_ALL_LAYERS = -1


@dataclass
class BlockRows:
    """Rows of summary.parquet and differences.parquet."""

    summary: list[dict[str, Any]]
    differences: list[dict[str, Any]]


def block_intervals(config: Any, runs: list[Run]) -> BlockRows:
    """Mean token entropy of the sampled neurons of each run over resampled blocks.

    A corpus of fewer than 8 blocks gives none. Runs of equal blocks are resampled alike, so that
    differences are of the same text.
    """
    found: dict[str, tuple[float, np.ndarray]] = {}
    summary = []
    for run in runs:
        if run.manifest["blocks"] < _FEWEST_BLOCKS or not run.table("blocks.parquet").num_rows:
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
                    "layer": _ALL_LAYERS,
                    "measure": "token_entropy",
                    "neurons": neurons,
                    "mean": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "resampled": "blocks",
                }
            )
    return BlockRows(summary, _differences(config, runs, found))


def _differences(
    config: Any, runs: list[Run], found: dict[str, tuple[float, np.ndarray]]
) -> list[dict[str, Any]]:
    """The first run less each other one of equal blocks: the same text was drawn for both."""
    rows, first = [], runs[0]
    for run in runs[1:]:
        same = run.manifest["block_tokens"] == first.manifest["block_tokens"]
        if not same or first.name not in found or run.name not in found:
            continue
        (one, resampled), (other, others) = found[first.name], found[run.name]
        interval = normal_interval(one - other, resampled - others, config.confidence, 0)
        rows.append(
            {
                "measure": "token_entropy",
                "layer": _ALL_LAYERS,
                "run_a": first.name,
                "run_b": run.name,
                "resampled": "blocks",
                "difference": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
        )
    return rows


def _weights(config: Any, blocks: int) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=_RESAMPLES)


def _run_replicates(config: Any, run: Run, weights: np.ndarray) -> tuple[float, np.ndarray, int]:
    """Mean entropy, its replicates, and the number of neurons."""
    table = run.table("blocks.parquet")
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


_COLUMNS = ("layer", "neuron", "block", "token", "count")
