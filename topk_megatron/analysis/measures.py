"""The formulas of docs/analysis.md: entropies, similarity of distributions, intervals.

Legend: N neurons, V tokens. A distribution over tokens is a row of non-negative counts or mass that
need not sum to 1. Entropies and divergences are in bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

_LN2 = float(np.log(2))
_RESAMPLE_ENTRIES = 1 << 22


def plugin_entropy(weights: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Return H = log2 W - (1/W) Σ w log2 w of every group, W = Σ w; NaN for an empty group.

    Args:
        weights: [entries], > 0, counts or mass of distinct outcomes.
        groups: int [entries], the group of each entry.
        num_groups: the number of groups.
    """
    weights = weights.astype(np.float64)
    total = np.bincount(groups, weights=weights, minlength=num_groups)
    inner = np.bincount(groups, weights=weights * np.log2(weights), minlength=num_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.log2(total) - inner / total
    return np.where(total > 0, np.maximum(entropy, 0.0), np.nan)


def corrected_entropy(counts: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the entropy of every group with Zhang's correction for the sample's size.

    H = (ψ(n) - (1/n) Σ c ψ(c)) / ln 2, n = Σ c. The plug-in entropy misses about (S - 1) / (2 n
    ln 2) bits where S tokens occur; the bias of this estimate decays exponentially in n (Zhang,
    Neural Computation 24, 2012). It is 0 for a single outcome, as it must be.
    """
    counts = counts.astype(np.float64)
    total = np.bincount(groups, weights=counts, minlength=num_groups)
    inner = np.bincount(groups, weights=counts * digamma(counts), minlength=num_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = (digamma(total) - inner / total) / _LN2
    return np.where(total > 0, np.maximum(entropy, 0.0), np.nan)


def js_similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return 1 - Jensen-Shannon divergence of rows [N, V], float64 [N].

    Equal rows have 1, disjoint rows 0, and rows without counts NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (x / x.sum(axis=-1, keepdims=True) for x in (one, other))
        middle = (p + q) / 2
        parts = [np.where(x > 0, x * np.log2(x / middle), 0.0).sum(axis=-1) / 2 for x in (p, q)]
    valid = (one.sum(axis=-1) > 0) & (other.sum(axis=-1) > 0)
    return np.where(valid, np.clip(1 - parts[0] - parts[1], 0, 1), np.nan)


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; n is the number of values that it is a mean of."""

    value: float
    low: float
    high: float
    n: int


def resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of `resamples` draws with replacement, float64 [resamples]."""
    count = len(values)
    means = np.empty(resamples)
    step = max(1, _RESAMPLE_ENTRIES // max(count, 1))
    for begin in range(0, resamples, step):
        end = min(begin + step, resamples)
        means[begin:end] = values[rng.integers(0, count, (end - begin, count))].mean(axis=1)
    return means


def mean_interval(
    values: np.ndarray, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Return the mean and its percentile bootstrap interval over the values.

    NaN are left out; without any other value the result is None.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    means = resampled_means(values, resamples, np.random.default_rng(seed))
    return _percentiles(float(values.mean()), means, confidence, len(values))


def difference_interval(
    one: np.ndarray,
    other: np.ndarray,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Return the difference of means and its bootstrap interval; None if a side has no value."""
    one, other = one[~np.isnan(one)], other[~np.isnan(other)]
    if not len(one) or not len(other):
        return None
    rng = np.random.default_rng(seed)
    means = resampled_means(one, resamples, rng) - resampled_means(other, resamples, rng)
    count = min(len(one), len(other))
    return _percentiles(float(one.mean() - other.mean()), means, confidence, count)


def normal_interval(value: float, replicates: np.ndarray, confidence: float, n: int) -> Interval:
    """Return value ± z standard deviations of the replicates.

    It is for estimators that resampling biases, where percentiles would be off.
    """
    from scipy.stats import norm

    reach = float(norm.ppf((1 + confidence) / 2)) * float(replicates.std(ddof=1))
    return Interval(value, value - reach, value + reach, n)


def _percentiles(value: float, replicates: np.ndarray, confidence: float, n: int) -> Interval:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Interval(value, float(low), float(high), n)


def block_replicates(
    counts: np.ndarray,
    blocks: np.ndarray,
    pairs: np.ndarray,
    measure: Callable[[np.ndarray], float],
    weights: np.ndarray,
) -> np.ndarray:
    """Return a measure of counts under resampled blocks, float64 [resamples].

    Args:
        counts: [entries], the count of each (pair, block).
        blocks: int [entries], the block of each entry.
        pairs: int [entries], the number of its (neuron, token) pair.
        measure: computes the measure from the counts of all pairs.
        weights: int [resamples, blocks], how often each block was drawn.
    """
    num_pairs = int(pairs.max()) + 1
    return np.array(
        [
            measure(np.bincount(pairs, weights=counts * weight[blocks], minlength=num_pairs))
            for weight in weights
        ]
    )
