"""A block's aggregates against loops over its activations."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_megatron.analysis.record import block
from topk_megatron.analysis.record.block import BlockText, Sizes, histogram, moments, top_examples

WIDTH, VOCAB, K = 6, 5, 3


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, BlockText]:
    """Neurons, values (with zeros, ties and negative ones) and text of a random block."""
    count = draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    neurons = np.stack([np.sort(rng.permutation(WIDTH)[:K]) for _ in range(count)])
    values = rng.integers(-2, 4, (count, K)).astype(np.float32) / 2
    documents = np.sort(rng.integers(0, 4, count)).astype(np.int32)
    length = draw(st.integers(1, 40))
    text = BlockText(rng.integers(0, VOCAB, count), documents, 1000, length)
    return neurons.astype(np.uint8), values, text


def sizes(top_n: int, mode: str = "value") -> Sizes:
    return Sizes(WIDTH, VOCAB, top_n, 2, 1, mode)


@pytest.mark.parametrize("dense_pairs", [0, 1 << 24])
@given(data=st.data())
def test_histogram_counts_every_activation_once(data: st.DataObject, dense_pairs: int) -> None:
    neurons, values, text = data.draw(blocks())
    counts: Counter[int] = Counter()
    mass: defaultdict[int, float] = defaultdict(float)
    for row, token in enumerate(text.tokens):
        for neuron, value in zip(neurons[row], values[row], strict=True):
            if value != 0:
                counts[int(neuron) * VOCAB + int(token)] += 1
                mass[int(neuron) * VOCAB + int(token)] += abs(float(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "DENSE_PAIRS", dense_pairs)
        found = histogram(neurons, values, text.tokens, sizes(3))
    assert found["keys"].tolist() == sorted(counts)
    assert found["counts"].tolist() == [counts[key] for key in sorted(counts)]
    assert found["mass"].tolist() == [mass[key] for key in sorted(counts)]


@given(data=blocks())
def test_moments_are_those_of_the_active_values(
    data: tuple[np.ndarray, np.ndarray, BlockText],
) -> None:
    neurons, values, _ = data
    found = moments(neurons, values, WIDTH)
    for neuron in range(WIDTH):
        own = values[(neurons == neuron) & (values != 0)].astype(np.float64)
        assert found["count"][neuron] == len(own)
        assert found["sum"][neuron] == own.sum()
        assert found["sum_squares"][neuron] == (own**2).sum()
        if len(own):
            assert (found["max"][neuron], found["min"][neuron]) == (own.max(), own.min())


@given(data=blocks(), top_n=st.integers(1, 8), mode=st.sampled_from(["value", "abs"]))
def test_top_examples_are_the_strongest_and_ties_go_to_the_earlier_position(
    data: tuple[np.ndarray, np.ndarray, BlockText], top_n: int, mode: str
) -> None:
    neurons, values, text = data
    found = top_examples(neurons, values, text, sizes(top_n, mode))
    expected = []
    for neuron in range(WIDTH):
        rows, places = np.nonzero((neurons == neuron) & (values != 0))
        own = [
            (-(abs(v) if mode == "abs" else v), row, v)
            for row, v in zip(rows, values[rows, places], strict=True)
        ]
        expected += [(neuron, 1000 + row, float(v)) for _, row, v in sorted(own)[:top_n]]
    values_found = found["value"].tolist()
    assert (
        list(zip(found["neuron"].tolist(), found["position"].tolist(), values_found, strict=True))
        == expected
    )


@given(data=blocks())
def test_windows_stay_in_their_sequence_and_document(
    data: tuple[np.ndarray, np.ndarray, BlockText],
) -> None:
    neurons, values, text = data
    found = top_examples(neurons, values, text, sizes(4))
    for place, position in enumerate(found["position"] - 1000):
        neuron = found["neuron"][place]
        for column, other in enumerate(range(position - 2, position + 2)):
            inside = 0 <= other < len(text.tokens)
            inside = inside and other // text.seq_length == position // text.seq_length
            inside = inside and text.documents[other] == text.documents[position]
            token = text.tokens[other] if inside else -1
            own = values[other][neurons[other] == neuron] if inside else np.zeros(0)
            assert found["context"][place, column] == token
            assert found["values"][place, column] == (own[0] if len(own) else 0)
