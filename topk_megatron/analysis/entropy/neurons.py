"""Token entropies of every neuron of one layer and of its shuffled control, and telling tokens.

Legend: N neurons, V tokens, E examples of a neuron, M neurons that have all E examples.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.corpus import join_tokens
from topk_megatron.analysis.histograms import Histogram
from topk_megatron.analysis.measures import corrected_entropy, plugin_entropy
from topk_megatron.analysis.study import Run

LISTED_TOKENS = 10
# Neurons per layer that the control is drawn for: its mean hardly varies, and drawing is slow.
CONTROL_NEURONS = 256


@dataclass
class LayerExamples:
    """The examples of one layer, for the neurons that have all E of them.

    Attributes:
        neurons: int64 [M], the neurons that have E examples.
        tokens: int32 [M, E], the tokens on which they fired.
        texts: the windows as text, M lists of E.
        values: float32 [M, E], the activations.
    """

    neurons: np.ndarray
    tokens: np.ndarray
    texts: list[list[str]]
    values: np.ndarray

    def shuffled(self, rng: np.random.Generator) -> "LayerExamples":
        """Deal the same examples to neurons at random."""
        order = rng.permutation(self.tokens.size)
        flat = [text for row in self.texts for text in row]
        mixed = [flat[place] for place in order]
        n = self.tokens.shape[1] if self.tokens.ndim == 2 else 0
        return LayerExamples(
            self.neurons,
            self.tokens.ravel()[order].reshape(self.tokens.shape),
            [mixed[begin : begin + n] for begin in range(0, len(mixed), n or 1)],
            self.values.ravel()[order].reshape(self.values.shape),
        )


@dataclass
class LayerEntropies:
    """The columns of entropy/neurons.parquet for one run and layer.

    Attributes:
        run: the run, or ``RUN:shuffled``.
        kind: the run's kind, or ``shuffled``.
        layer: the layer.
        neurons: int64 [N].
        columns: the columns of numbers by name, each [N]; NaN is a missing number.
        lists: the columns of lists by name, each N arrays.
    """

    run: str
    kind: str
    layer: int
    neurons: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, list[np.ndarray]] = field(default_factory=dict)


def layer_examples(run: Run, layer: int) -> LayerExamples:
    """Read a layer's examples and windows."""
    table = run.examples.filter(pa.array(run.examples["layer"].to_numpy() == layer))
    wanted = run.manifest["top_n"]
    neurons = table["neuron"].to_numpy()
    counts = np.bincount(neurons, minlength=run.width)
    full = np.flatnonzero(counts == wanted)
    kept = np.isin(neurons, full)
    vocabulary = run.vocabulary["text"].to_pylist()
    contexts = table["context"].to_pylist()
    texts = [
        join_tokens([vocabulary[token] for token in contexts[row]]) for row in np.flatnonzero(kept)
    ]
    shape = (len(full), wanted)
    return LayerExamples(
        full,
        table["token"].to_numpy()[kept].reshape(shape),
        [texts[begin : begin + wanted] for begin in range(0, len(texts), wanted)],
        table["value"].to_numpy()[kept].reshape(shape),
    )


def token_entropies(run: Run, layer: int, examples: LayerExamples) -> LayerEntropies:
    """Measure the token entropies of every neuron; list its most frequent and telling tokens."""
    histogram = run.histogram(layer)
    groups, width = histogram.neurons, histogram.width
    found = LayerEntropies(run.name, run.kind, layer, np.arange(width))
    found.columns = {
        "count": histogram.totals,
        "token_entropy": corrected_entropy(histogram.counts, groups, width),
        "token_entropy_plugin": plugin_entropy(histogram.counts, groups, width),
        "token_entropy_mass": plugin_entropy(histogram.mass, groups, width),
        "token_entropy_top": _top_entropy(examples, width),
        "examples": _example_counts(run, layer),
    }
    marginal = run.vocabulary["count"].to_numpy().astype(np.float64)
    found.lists = telling_tokens(histogram, marginal / marginal.sum())
    return found


def control_entropies(
    run: Run, layer: int, examples: LayerExamples, rng: np.random.Generator
) -> LayerEntropies:
    """Measure the entropies that random tokens would have: the control.

    Every neuron gets as many tokens as it has activations, drawn without replacement from the
    tokens of all activations of the layer; examples are dealt at random.
    """
    histogram = run.histogram(layer)
    totals = histogram.totals
    pool = np.bincount(histogram.tokens, weights=histogram.counts, minlength=histogram.vocab_size)
    pool = pool.astype(np.int64)
    active = np.flatnonzero(totals)
    chosen = np.sort(rng.permutation(active)[:CONTROL_NEURONS])
    drawn = [
        rng.multivariate_hypergeometric(pool, int(totals[neuron]), method="marginals")
        for neuron in chosen
    ]
    counts = np.concatenate([row[row > 0] for row in drawn]) if drawn else np.zeros(0)
    groups = np.repeat(np.arange(len(chosen)), [np.count_nonzero(row) for row in drawn])
    found = LayerEntropies(f"{run.name}:shuffled", "shuffled", layer, chosen)
    empty = np.full(len(chosen), np.nan)
    found.columns = {
        "count": totals[chosen],
        "token_entropy": corrected_entropy(counts, groups, len(chosen)),
        "token_entropy_plugin": plugin_entropy(counts, groups, len(chosen)),
        "token_entropy_mass": empty,
        "token_entropy_top": _top_entropy(examples.shuffled(rng), histogram.width)[chosen],
        "examples": _example_counts(run, layer)[chosen],
    }
    nothing = [np.zeros(0, np.int32)] * len(chosen)
    found.lists = dict.fromkeys(("top_tokens", "concept_tokens"), nothing)
    found.lists |= dict.fromkeys(("top_shares", "concept_lifts"), nothing)
    return found


def telling_tokens(histogram: Histogram, marginal: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Find the most frequent tokens of each neuron, and those that set it apart from the corpus.

    A token's part of the divergence from the corpus is p log2(p / q): p its share among the
    neuron's activations, q its share in the corpus; its lift is p / q.
    """
    groups = histogram.neurons
    totals = np.maximum(histogram.totals, 1)
    shares = histogram.counts / totals[groups]
    lifts = shares / np.maximum(marginal[histogram.tokens], 1e-300)
    telling = np.where(histogram.counts > 1, shares * np.log2(lifts), -1.0)
    found: dict[str, list[np.ndarray]] = {}
    for names, key, kept, values in (
        (("top_tokens", "top_shares"), shares, shares > 0, shares),
        (("concept_tokens", "concept_lifts"), telling, telling > 0, lifts),
    ):
        entries = np.flatnonzero(kept)
        order = entries[np.lexsort((histogram.tokens[entries], -key[entries], groups[entries]))]
        starts = np.searchsorted(groups[order], np.arange(histogram.width + 1))
        parts = [
            order[begin : min(begin + LISTED_TOKENS, end)]
            for begin, end in itertools.pairwise(starts)
        ]
        found[names[0]] = [histogram.tokens[part] for part in parts]
        found[names[1]] = [values[part] for part in parts]
    return found


def _top_entropy(examples: LayerExamples, width: int) -> np.ndarray:
    found = np.full(width, np.nan)
    for neuron, tokens in zip(examples.neurons, examples.tokens, strict=True):
        found[neuron] = entropy_of(tokens)
    return found


def entropy_of(tokens: np.ndarray) -> float:
    """Return the plug-in entropy in bits of a list of tokens."""
    counts = np.unique(tokens, return_counts=True)[1]
    return float(plugin_entropy(counts, np.zeros(len(counts), np.int64), 1)[0])


def _example_counts(run: Run, layer: int) -> np.ndarray:
    table = run.examples
    neurons = table["neuron"].to_numpy()[table["layer"].to_numpy() == layer]
    return np.bincount(neurons, minlength=run.width)
