"""Entropies, similarities and intervals against their definitions and known answers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from topk_megatron.analysis.histograms import (
    Histogram,
    affinities,
    js_of_histograms,
    match_neurons,
    others,
)
from topk_megatron.analysis.measures import (
    block_replicates,
    corrected_entropy,
    difference_interval,
    js_similarity,
    mean_interval,
    plugin_entropy,
)

COUNTS = hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(1, 60))
TABLE = hnp.arrays(np.int64, (5, 7), elements=st.integers(0, 9))


def one(estimator, counts) -> float:
    counts = np.asarray(counts)
    return float(estimator(counts, np.zeros(len(counts), np.int64), 1)[0])


def histogram_of(table: np.ndarray) -> Histogram:
    """A histogram with counts [N, V]."""
    neurons, tokens = np.nonzero(table)
    starts = np.searchsorted(neurons, np.arange(len(table) + 1))
    counts = table[neurons, tokens]
    width, vocab_size = table.shape
    mass = counts.astype(float)
    return Histogram(width, vocab_size, starts, tokens.astype(np.int32), counts, mass)


class TestEntropy:
    @pytest.mark.parametrize("estimator", [plugin_entropy, corrected_entropy])
    @pytest.mark.parametrize("count", [1, 2, 7, 100000])
    def test_a_single_token_has_0_bits(self, estimator, count: int) -> None:
        assert one(estimator, [count]) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_uniform_over_2_to_the_n_tokens_has_n_bits(self, bits: int) -> None:
        assert one(plugin_entropy, [50] * 2**bits) == pytest.approx(bits, abs=1e-12)
        assert one(corrected_entropy, [5000] * 2**bits) == pytest.approx(bits, abs=1e-3)

    @given(counts=COUNTS)
    def test_plugin_is_the_definition(self, counts: np.ndarray) -> None:
        shares = [count / counts.sum() for count in counts]
        expected = -sum(p * math.log2(p) for p in shares)
        assert one(plugin_entropy, counts) == pytest.approx(expected, abs=1e-9)

    @given(counts=hnp.arrays(np.int64, st.integers(1, 5), elements=st.integers(1, 8)))
    def test_correction_is_zhangs_sum(self, counts: np.ndarray) -> None:
        # sum over v of (1 / v) times the unbiased estimate of sum_i p_i (1 - p_i)^v.
        n, expected = int(counts.sum()), 0.0
        for v in range(1, n):
            for c in counts.tolist():
                product = math.prod(1 - (c - 1) / (n - 1 - j) for j in range(v))
                expected += c / n * product / v
        assert one(corrected_entropy, counts) == pytest.approx(expected / math.log(2), abs=1e-9)

    def test_correction_comes_closer_to_the_truth_on_small_samples(self) -> None:
        rng = np.random.default_rng(0)
        p = 1 / np.arange(1, 201)
        p /= p.sum()
        truth = -(p * np.log2(p)).sum()
        samples = rng.multinomial(300, p, size=200)
        plain, corrected = (
            np.mean([one(estimator, row[row > 0]) for row in samples])
            for estimator in (plugin_entropy, corrected_entropy)
        )
        assert abs(corrected - truth) < 0.6 * abs(plain - truth)

    @given(table=TABLE)
    def test_groups_are_independent_and_empty_ones_have_none(self, table: np.ndarray) -> None:
        groups, tokens = np.nonzero(table)
        found = plugin_entropy(table[groups, tokens], groups, len(table))
        for row, bits in zip(table, found, strict=True):
            if row.any():
                assert bits == pytest.approx(one(plugin_entropy, row[row > 0]), abs=1e-9)
            else:
                assert np.isnan(bits)


class TestSimilarity:
    @given(table=TABLE, other=TABLE)
    def test_js_is_the_definition(self, table: np.ndarray, other: np.ndarray) -> None:
        found = js_similarity(table.astype(float), other.astype(float))
        sparse = js_of_histograms(histogram_of(table), histogram_of(other), chunk=2)
        np.testing.assert_array_equal(found, sparse)
        for p, q, similarity in zip(table, other, found, strict=True):
            if not p.any() or not q.any():
                assert np.isnan(similarity)
                continue
            p, q = p / p.sum(), q / q.sum()
            middle = (p + q) / 2
            divergence = sum(
                sum(a * math.log2(a / m) for a, m in zip(x, middle, strict=True) if a) / 2
                for x in (p, q)
            )
            assert similarity == pytest.approx(1 - divergence, abs=1e-9)

    def test_equal_is_1_and_disjoint_is_0(self) -> None:
        table = np.array([[2.0, 2, 0, 0], [1, 1, 0, 0]])
        other = np.array([[5.0, 5, 0, 0], [0, 0, 3, 1]])
        np.testing.assert_allclose(js_similarity(table, other), [1, 0], atol=1e-12)

    @given(table=TABLE, other=TABLE)
    def test_affinities_are_bhattacharyyas(self, table: np.ndarray, other: np.ndarray) -> None:
        found = affinities(histogram_of(table), histogram_of(other))
        for n, m in itertools.product(range(5), range(5)):
            if table[n].any() and other[m].any():
                p, q = table[n] / table[n].sum(), other[m] / other[m].sum()
                assert found[n, m] == pytest.approx(np.sqrt(p * q).sum(), abs=1e-6)
            else:
                assert found[n, m] == 0

    def test_permuted_neurons_are_matched_back(self) -> None:
        rng = np.random.default_rng(1)
        table = rng.multinomial(500, rng.dirichlet(np.full(60, 0.1), size=12))
        order = rng.permutation(12)
        found = match_neurons(histogram_of(table), histogram_of(table[order]))
        assert (order[found.match] == np.arange(12)).all()
        assert found.mutual.all()
        np.testing.assert_allclose(found.affinity, 1, atol=1e-6)

    def test_silent_neurons_match_nothing(self) -> None:
        table = np.array([[0, 0, 0], [1, 2, 0], [0, 1, 5]])
        found = match_neurons(histogram_of(table), histogram_of(table[[1, 0, 2]]))
        assert found.match.tolist() == [-1, 0, 2]
        assert found.mutual.tolist() == [False, True, True]
        assert np.isnan(found.affinity[0])

    @pytest.mark.parametrize("width", [2, 3, 50])
    def test_the_control_is_always_another_neuron(self, width: int) -> None:
        partner = others(width, 0)
        assert sorted(partner) == list(range(width))
        assert (partner != np.arange(width)).all()


class TestIntervals:
    def test_an_interval_holds_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(2)
        hits = 0
        for trial in range(300):
            found = mean_interval(rng.normal(3, 1, 60), resamples=300, seed=trial)
            assert found is not None
            hits += found.low <= 3 <= found.high
        assert 0.90 <= hits / 300 <= 0.98

    def test_missing_values_are_left_out_and_nothing_gives_none(self) -> None:
        found = mean_interval(np.array([1.0, np.nan, 3.0]))
        assert found is not None
        assert (found.value, found.n) == (2, 2)
        assert mean_interval(np.full(3, np.nan)) is None
        assert difference_interval(np.zeros(0), np.ones(3)) is None

    def test_a_difference_of_means_has_its_sign(self) -> None:
        rng = np.random.default_rng(3)
        found = difference_interval(rng.normal(0, 1, 200), rng.normal(1, 1, 200))
        assert found is not None
        assert found.high < 0
        assert found.low < found.value < found.high

    def test_resampled_blocks_are_weighted_sums(self) -> None:
        counts, blocks = np.array([1, 2, 3, 4]), np.array([0, 1, 0, 1])
        pairs = np.array([0, 0, 1, 1])
        seen = []
        block_replicates(
            counts,
            blocks,
            pairs,
            lambda c: seen.append(c.tolist()) or 0.0,
            np.array([[2, 0], [1, 1], [0, 2]]),
        )
        assert seen == [[2, 6], [3, 7], [4, 8]]
