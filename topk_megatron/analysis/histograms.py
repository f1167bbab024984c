"""What neurons fire on: their token histograms, and which neurons of two runs or layers are alike.

Legend: N and M neurons, V tokens.
"""

from dataclasses import dataclass

import numpy as np

from topk_megatron.analysis.measures import js_similarity

# Neurons whose dense rows of V numbers are in memory at once.
_ROWS = 256


@dataclass(frozen=True)
class Histogram:
    """The token histograms of one layer, of all neurons in a row.

    Attributes:
        width: neurons N of the layer.
        vocab_size: tokens V.
        starts: int64 [N + 1]; neuron n has the entries starts[n] to starts[n + 1].
        tokens: int32, ascending within a neuron.
        counts: int64, activations on that token.
        mass: float64, sum of |value| on that token.
    """

    width: int
    vocab_size: int
    starts: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    mass: np.ndarray

    def of(self, neuron: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens, counts and mass of one neuron."""
        part = slice(self.starts[neuron], self.starts[neuron + 1])
        return self.tokens[part], self.counts[part], self.mass[part]

    @property
    def totals(self) -> np.ndarray:
        """The activations of every neuron, int64 [N]."""
        sums = np.concatenate([[0], np.cumsum(self.counts)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    @property
    def neurons(self) -> np.ndarray:
        """The neuron of every entry, int64."""
        return np.repeat(np.arange(self.width), np.diff(self.starts))


def dense_counts(histogram: Histogram, neurons: np.ndarray | None = None) -> np.ndarray:
    """Return the counts of all or some neurons as float64 [N, V]."""
    if neurons is None:
        neurons = np.arange(histogram.width)
    rows = np.zeros((len(neurons), histogram.vocab_size))
    for row, neuron in enumerate(neurons):
        tokens, counts, _ = histogram.of(int(neuron))
        rows[row, tokens] = counts
    return rows


def js_of_histograms(
    one: Histogram, other: Histogram, partner: np.ndarray | None = None, chunk: int = _ROWS
) -> np.ndarray:
    """Return `js_similarity` of neuron n of `one` to neuron partner[n] of `other`, float64 [N]."""
    partner = np.arange(other.width) if partner is None else partner
    found = np.empty(one.width)
    for begin in range(0, one.width, chunk):
        part = np.arange(begin, min(begin + chunk, one.width))
        found[part] = js_similarity(dense_counts(one, part), dense_counts(other, partner[part]))
    return found


@dataclass(frozen=True)
class Matches:
    """The nearest neurons by the Bhattacharyya coefficient of token distributions.

    Attributes:
        match: int64 [N], the nearest neuron of the other side; -1 for a silent neuron.
        affinity: float64 [N], the coefficient with it; NaN for a silent neuron.
        mutual: bool [N], whether the nearest neuron of the nearest is the neuron itself.
    """

    match: np.ndarray
    affinity: np.ndarray
    mutual: np.ndarray


def match_neurons(one: Histogram, other: Histogram) -> Matches:
    """Match the neurons of `one` to those of `other`; a tie goes to the lower number."""
    table = affinities(one, other)
    silent, without = one.totals == 0, other.totals == 0
    table[:, without] = -1
    match = table.argmax(axis=1)
    back = np.where(silent[:, None], -1, table).argmax(axis=0)
    best = table[np.arange(one.width), match]
    valid = ~silent & (best >= 0)
    return Matches(
        np.where(valid, match, -1),
        np.where(valid, best, np.nan),
        valid & (back[match] == np.arange(one.width)),
    )


def affinities(one: Histogram, other: Histogram) -> np.ndarray:
    """Return the Bhattacharyya coefficients Σ √(p q) of all pairs, float64 [N, M].

    The coefficient of a silent neuron is 0.
    """
    right = _roots(other, 0, other.width)
    table = np.empty((one.width, other.width))
    for begin in range(0, one.width, _ROWS):
        end = min(begin + _ROWS, one.width)
        table[begin:end] = _roots(one, begin, end) @ right.T
    return table


def _roots(histogram: Histogram, begin: int, end: int) -> np.ndarray:
    """Return the square roots of the distributions of neurons [begin, end), float32 [n, V]."""
    rows = np.zeros((end - begin, histogram.vocab_size), dtype=np.float32)
    part = slice(histogram.starts[begin], histogram.starts[end])
    sizes = np.diff(histogram.starts[begin : end + 1])
    totals = np.maximum(histogram.totals[begin:end], 1)
    shares = histogram.counts[part] / np.repeat(totals, sizes)
    rows[np.repeat(np.arange(end - begin), sizes), histogram.tokens[part]] = np.sqrt(shares)
    return rows


def others(width: int, seed: int) -> np.ndarray:
    """Return another neuron at random for each, int64 [N]: a cycle through a random order."""
    order = np.random.default_rng(seed).permutation(width)
    partner = np.empty(width, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
