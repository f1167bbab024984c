"""`track`: the same neuron over training and from layer to layer.

A neuron is known by its distribution of tokens and its strongest contexts. Both are compared with
those of the neuron of the same number at the last checkpoint, and with those of another neuron.
This file measures; results.py makes tables and claims of it.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.entropy.neurons import layer_examples
from topk_megatron.analysis.entropy.semantic import Embed
from topk_megatron.analysis.histograms import (
    Histogram,
    js_of_histograms,
    match_neurons,
    others,
)
from topk_megatron.analysis.measures import corrected_entropy, plugin_entropy
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import nullable


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """What counts as specialised and as formed.

    Attributes:
        min_count: activations that a neuron needs.
        specialised_bits: how far the token entropy of a specialised neuron must be below that of
            the corpus, in bits; 2 bits are a quarter of the effective vocabulary.
        formed_similarity: a neuron is formed once its similarity to the end stays at least this.
        context_neurons: neurons per layer whose contexts are embedded; 0 embeds none.
        bootstrap: resamples of an interval.
        seed: the seed of controls and resampling.
    """

    min_count: int = 50
    specialised_bits: float = 2.0
    formed_similarity: float = 0.5
    context_neurons: int = 32
    bootstrap: int = 1000
    seed: int = 0


_LAYERS = pa.schema(
    [
        ("layer_a", pa.int16()),
        ("layer_b", pa.int16()),
        ("neuron", pa.int32()),
        ("similarity", pa.float64()),
        ("other_similarity", pa.float64()),
        ("best_match", pa.int32()),
        ("best_similarity", pa.float64()),
        ("keeps", pa.bool_()),
    ]
)
# The columns of one (checkpoint, layer), each [N].
Columns = dict[str, np.ndarray]


def track_layer(
    config: TrackConfig, runs: list[Run], layer: int, embed: Embed | None
) -> tuple[list[Columns], Columns]:
    """Follow the neurons of one layer through the runs, in the order of training.

    Returns:
        The columns of every checkpoint, and those of track/neurons.parquet.
    """
    histograms = [run.histogram(layer) for run in runs]
    last = histograms[-1]
    partner = others(last.width, config.seed)
    centres = [_centres(config, run, layer, embed) for run in runs]
    found = []
    for run, histogram, centre in zip(runs, histograms, centres, strict=True):
        matches = match_neurons(histogram, last)
        entropy = corrected_entropy(histogram.counts, histogram.neurons, histogram.width)
        found.append(
            {
                "count": histogram.totals,
                "token_entropy": entropy,
                "similarity": js_of_histograms(histogram, last),
                "other_similarity": js_of_histograms(histogram, last, partner),
                "example_overlap": _overlap(run, runs[-1], layer),
                "context_similarity": (centre * centres[-1]).sum(axis=1),
                "best_match": matches.match,
                "specialised": _specialised(config, run, entropy, histogram),
            }
        )
    return found, _formation(config, runs, histograms, found)


def _specialised(
    config: TrackConfig, run: Run, entropy: np.ndarray, histogram: Histogram
) -> np.ndarray:
    enough = histogram.totals >= config.min_count
    return enough & (entropy <= corpus_entropy(run) - config.specialised_bits)


def corpus_entropy(run: Run) -> float:
    """Return the token entropy of the text itself, in bits."""
    counts = run.vocabulary["count"].to_numpy()
    counts = counts[counts > 0]
    return float(plugin_entropy(counts, np.zeros(len(counts), np.int64), 1)[0])


def stays_from(flags: np.ndarray) -> np.ndarray:
    """Return the first checkpoint from which a flag [checkpoints, N] stays true; -1 for never."""
    kept = np.logical_and.accumulate(flags[::-1], axis=0)[::-1]
    return np.where(kept.any(axis=0), kept.argmax(axis=0), -1)


def _formation(
    config: TrackConfig, runs: list[Run], histograms: list[Histogram], found: list[Columns]
) -> Columns:
    similarity = np.stack([columns["similarity"] for columns in found])
    steps = [1 - js_of_histograms(one, two) for one, two in itertools.pairwise(histograms)]
    drift = np.stack(steps)
    return {
        "specialised_at": stays_from(np.stack([columns["specialised"] for columns in found])),
        "formed_at": stays_from(np.nan_to_num(similarity) >= config.formed_similarity),
        "drift": _mean(drift),
        "late_drift": _mean(drift[len(drift) // 2 :]),
        "final_entropy": found[-1]["token_entropy"],
        "final_count": found[-1]["count"],
    }


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def _overlap(run: Run, last: Run, layer: int) -> np.ndarray:
    """Return the share of each neuron's examples at the last checkpoint that it has here, [N]."""
    tokens = last.manifest["corpus"]["tokens"]
    keys = []
    for one in (run, last):
        kept = one.examples["layer"].to_numpy() == layer
        neurons = one.examples["neuron"].to_numpy()[kept].astype(np.int64)
        keys.append(neurons * tokens + one.examples["position"].to_numpy()[kept])
    owners = keys[1] // tokens
    total = np.bincount(owners, minlength=last.width)
    shared = np.bincount(owners, weights=np.isin(keys[1], keys[0]), minlength=last.width)
    with np.errstate(invalid="ignore"):
        return shared / np.where(total > 0, total, np.nan)


def _centres(config: TrackConfig, run: Run, layer: int, embed: Embed | None) -> np.ndarray:
    """Return the unit means of the embedded contexts [N, D]; NaN where none are embedded."""
    if embed is None or not config.context_neurons:
        return np.full((run.width, 1), np.nan)
    examples = layer_examples(run, layer)
    rng = np.random.default_rng([config.seed, layer])
    chosen = set(rng.permutation(run.width)[: config.context_neurons].tolist())
    rows = [row for row, neuron in enumerate(examples.neurons) if int(neuron) in chosen]
    texts = sorted({text for row in rows for text in examples.texts[row]})
    if not texts:
        return np.full((run.width, 1), np.nan)
    vectors = dict(zip(texts, embed(texts), strict=True))
    size = len(next(iter(vectors.values())))
    centres = np.full((run.width, size), np.nan)
    for row in rows:
        mean = np.mean([vectors[text] for text in examples.texts[row]], axis=0)
        centres[examples.neurons[row]] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return centres


def track_layers(run: Run, seed: int) -> pa.Table:
    """Return track/layers.parquet: what neurons keep from one recorded layer to the next."""
    tables = []
    histograms = {layer: run.histogram(layer) for layer in run.layers}
    for a, b in zip(run.layers[:-1], run.layers[1:], strict=True):
        one, two = histograms[a], histograms[b]
        matches = match_neurons(one, two)
        nearest = np.maximum(matches.match, 0)
        best = np.where(matches.match < 0, np.nan, js_of_histograms(one, two, nearest))
        size = one.width
        tables.append(
            pa.table(
                {
                    "layer_a": np.full(size, a, np.int16),
                    "layer_b": np.full(size, b, np.int16),
                    "neuron": np.arange(size, dtype=np.int32),
                    "similarity": nullable(js_of_histograms(one, two)),
                    "other_similarity": nullable(js_of_histograms(one, two, others(size, seed))),
                    "best_match": pa.array(matches.match.astype(np.int32), mask=matches.match < 0),
                    "best_similarity": nullable(best),
                    "keeps": matches.match == np.arange(size),
                }
            )
        )
    return pa.concat_tables(tables) if tables else _LAYERS.empty_table()
