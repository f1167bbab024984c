"""`entropy`: how specialised neurons are, by the tokens and by the contexts they fire on.

Formulas and choices: docs/analysis.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.analysis.entropy.neurons import (
    LayerEntropies,
    LayerExamples,
    control_entropies,
    layer_examples,
    token_entropies,
)
from topk_megatron.analysis.entropy.results import write_results
from topk_megatron.analysis.entropy.semantic import (
    Embed,
    load_embedding,
    random_distance,
    semantic_entropy,
)
from topk_megatron.analysis.study import open_runs
from topk_megatron.errors import AnalysisError

SENSITIVITY_FACTORS = (0.7, 0.85, 1.15, 1.3)


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """What to compare.

    Attributes:
        study: the study directory.
        runs: names of the runs; differences are taken to the first.
        min_count: activations that a neuron needs to be part of a mean.
        semantic: also measure semantic entropy.
        semantic_neurons: neurons of each layer whose semantic entropy is measured; None is all.
        embedding: folder of a sentence-transformers model; None is all-MiniLM-L6-v2.
        distance: cosine distance that separates clusters; None takes `distance_quantile` of random
            pairs of contexts.
        distance_quantile: see `distance`.
        bootstrap: resamples.
        confidence: of the intervals.
        seed: of everything random.
    """

    study: Path
    runs: list[str]
    min_count: int = 50
    semantic: bool = True
    semantic_neurons: int | None = None
    embedding: Path | None = None
    distance: float | None = None
    distance_quantile: float = 0.05
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass
class Semantics:
    """What semantic entropies were measured with.

    Attributes:
        refused: why they were not measured, None if they were.
        distance: the cut of the clusters.
        sensitivity: by (run, distance), values of the neurons measured.
    """

    refused: str | None
    distance: float | None
    sensitivity: dict[tuple[str, float], list[float]]


def entropy(config: EntropyConfig, embed: Embed | None = None) -> dict[str, Any]:
    """Measure and compare the runs; writes entropy/ and claims.json.

    Args:
        config: what to compare.
        embed: texts to unit vectors; None loads the embedding model.

    Returns:
        The content of parameters.json.

    Raises:
        AnalysisError: a run is missing, unfinished, damaged or of other text. A missing embedding
            model is no error: semantic entropies are left out and the reason is recorded.
    """
    if not config.runs:
        raise AnalysisError("--runs names no run to measure")
    if len(set(config.runs)) != len(config.runs):
        raise AnalysisError("--runs names a run twice")
    runs = open_runs(config.study, config.runs)
    rng = np.random.default_rng(config.seed)
    found: list[LayerEntropies] = []
    examples: dict[tuple[str, int], LayerExamples] = {}
    for run in runs:
        for layer in run.layers:
            own = layer_examples(run, layer)
            found.append(token_entropies(run, layer, own))
            control = control_entropies(run, layer, own, rng)
            found.append(control)
            examples[run.name, layer] = own
            examples[control.run, layer] = own.shuffled(rng)
    semantics = _semantics(config, found, examples, embed)
    parameters = {
        "runs": config.runs,
        "min_count": config.min_count,
        "top_n": [run.manifest["top_n"] for run in runs],
        "distance": semantics.distance,
        "distance_quantile": config.distance_quantile if config.distance is None else None,
        "semantic_refused": semantics.refused,
        "semantic_neurons": config.semantic_neurons,
        "embedding": str(config.embedding) if config.embedding else "all-MiniLM-L6-v2",
        "bootstrap": config.bootstrap,
        "confidence": config.confidence,
        "seed": config.seed,
    }
    write_results(config, runs, found, examples, semantics, parameters)
    return parameters


def _semantics(
    config: EntropyConfig,
    found: list[LayerEntropies],
    examples: dict[tuple[str, int], LayerExamples],
    embed: Embed | None,
) -> Semantics:
    """Fill the semantic columns."""
    for layer in found:
        size = len(layer.neurons)
        layer.columns["semantic_entropy"] = np.full(size, np.nan)
        layer.columns["semantic_clusters"] = np.full(size, np.nan)
    if not config.semantic:
        return Semantics("not asked for (--no-semantic)", config.distance, {})
    try:
        embed = embed or load_embedding(config.embedding)
    except AnalysisError as error:
        return Semantics(str(error), config.distance, {})
    chosen = {
        (one.run, one.layer): _chosen(config, one, examples[one.run, one.layer]) for one in found
    }
    vectors = _embed_all(embed, examples, chosen)
    rng = np.random.default_rng(config.seed)
    distance = config.distance
    if distance is None:
        pool = np.stack(list(vectors.values())) if vectors else np.zeros((0, 1), np.float32)
        distance = random_distance(pool, config.distance_quantile, rng) if len(pool) > 1 else 0.5
    sensitivity: dict[tuple[str, float], list[float]] = {}
    for one in found:
        own = examples[one.run, one.layer]
        for row in chosen[one.run, one.layer]:
            matrix = np.stack([vectors[text] for text in own.texts[row]])
            place = int(np.searchsorted(one.neurons, own.neurons[row]))
            bits, number = semantic_entropy(matrix, distance)
            one.columns["semantic_entropy"][place] = bits
            one.columns["semantic_clusters"][place] = number
            for factor in SENSITIVITY_FACTORS:
                key = (one.run, factor * distance)
                value = semantic_entropy(matrix, factor * distance)[0]
                sensitivity.setdefault(key, []).append(value)
    return Semantics(None, distance, sensitivity)


def _chosen(config: EntropyConfig, one: LayerEntropies, own: LayerExamples) -> np.ndarray:
    """Rows of `own` to measure: neurons that are active enough and, of those, a random sample."""
    counts = np.zeros(int(max(own.neurons, default=0)) + 1)
    known = one.neurons[one.neurons < len(counts)]
    counts[known] = one.columns["count"][: len(known)]
    rows = np.flatnonzero(counts[own.neurons] >= config.min_count)
    if config.semantic_neurons is not None:
        rng = np.random.default_rng([config.seed, one.layer])
        rows = np.sort(rng.permutation(rows)[: config.semantic_neurons])
    return rows


def _embed_all(
    embed: Callable[[Any], np.ndarray],
    examples: dict[tuple[str, int], LayerExamples],
    chosen: dict[tuple[str, int], np.ndarray],
) -> dict[str, np.ndarray]:
    """Every text that is needed, once."""
    texts: dict[str, None] = {}
    for key, rows in chosen.items():
        for row in rows:
            texts.update(dict.fromkeys(examples[key].texts[row]))
    # Sorted by length, so that batches hold little padding and results do not depend on the runs.
    ordered = sorted(texts, key=lambda text: (len(text), text))
    if not ordered:
        return {}
    return dict(zip(ordered, embed(ordered), strict=True))
