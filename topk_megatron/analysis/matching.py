"""Which neuron of one run or layer is which of another, by what they fire on."""

from dataclasses import dataclass

import numpy as np

from topk_megatron.analysis.study import Histogram

_ROWS = 256


@dataclass(frozen=True)
class Matches:
    """Nearest neurons by the Bhattacharyya coefficient of token distributions.

    Attributes:
        match: int64 [N], the nearest neuron of the other; -1 for a silent neuron.
        affinity: float64 [N], to it; NaN for a silent neuron.
        mutual: bool [N], the nearest of the nearest is the neuron itself.
        own: float64 [N], affinity to the neuron of the same number; NaN where one is silent.
    """

    match: np.ndarray
    affinity: np.ndarray
    mutual: np.ndarray
    own: np.ndarray


def match_neurons(one: Histogram, other: Histogram) -> Matches:
    """Match the neurons of `one` to those of `other`; a tie goes to the lower number."""
    table = affinities(one, other)
    silent, without = one.totals == 0, other.totals == 0
    table[:, without] = -1
    match = table.argmax(axis=1)
    back = np.where(silent[:, None], -1, table).argmax(axis=0)
    best = table[np.arange(one.width), match]
    valid = ~silent & (best >= 0)
    shared = min(one.width, other.width)
    own = np.full(one.width, np.nan)
    own[:shared] = np.where(
        silent[:shared] | without[:shared], np.nan, table[np.arange(shared), np.arange(shared)]
    )
    return Matches(
        np.where(valid, match, -1),
        np.where(valid, best, np.nan),
        valid & (back[match] == np.arange(one.width)),
        own,
    )


def affinities(one: Histogram, other: Histogram) -> np.ndarray:
    """Bhattacharyya coefficients of all pairs, float64 [N, M]; 0 where a neuron is silent."""
    right = roots(other, 0, other.width)
    table = np.empty((one.width, other.width))
    for begin in range(0, one.width, _ROWS):
        end = min(begin + _ROWS, one.width)
        table[begin:end] = roots(one, begin, end) @ right.T
    return table


def roots(histogram: Histogram, begin: int, end: int) -> np.ndarray:
    """Square roots of the token distributions of neurons [begin, end), float32 [n, V]."""
    rows = np.zeros((end - begin, histogram.vocab_size), dtype=np.float32)
    part = slice(histogram.starts[begin], histogram.starts[end])
    sizes = np.diff(histogram.starts[begin : end + 1])
    totals = np.maximum(histogram.totals[begin:end], 1)
    shares = histogram.counts[part] / np.repeat(totals, sizes)
    rows[np.repeat(np.arange(end - begin), sizes), histogram.tokens[part]] = np.sqrt(shares)
    return rows


def others(width: int, seed: int) -> np.ndarray:
    """For every neuron another one at random, int64 [N]: a cycle through a random order."""
    order = np.random.default_rng(seed).permutation(width)
    partner = np.empty(width, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
