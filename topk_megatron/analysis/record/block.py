"""The part of one block of the corpus in the aggregates of one layer.

A block is a fixed number of whole sequences. Its part of every aggregate is computed from its own
tokens alone and parts are added in the order of the blocks, so that neither interruptions nor the
number of ranks can change a bit of the result.

Legend: T tokens of the block, K survivors per token, N neurons of the layer, V tokens of the
vocabulary, E examples, W tokens of a window.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from topk_megatron.ops.reference import KEYS

# Above this many (neuron, token) pairs a block is counted by sorting instead of in a dense table.
DENSE_PAIRS = 1 << 24
_WINDOW_CHUNK = 4096


@dataclass(frozen=True)
class BlockText:
    """The tokens that a layer's states belong to.

    Attributes:
        tokens: int64 [T].
        documents: int32 [T].
        first: position of the block's first token in the corpus.
        seq_length: tokens per sequence; the last sequence may be shorter.
    """

    tokens: np.ndarray
    documents: np.ndarray
    first: int
    seq_length: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is counted and kept.

    Attributes:
        width: neurons N.
        vocab_size: tokens V.
        top_n: examples kept per neuron.
        before: tokens of a window before the example.
        after: tokens of a window after it.
        mode: the selection mode, by whose key examples are ranked.
    """

    width: int
    vocab_size: int
    top_n: int
    before: int
    after: int
    mode: str

    def strength(self, values: np.ndarray) -> np.ndarray:
        """Return the keys of activations: the larger, the stronger the example."""
        return KEYS[self.mode](torch.from_numpy(values)).numpy()


def aggregates(
    neurons_TK: np.ndarray, values_TK: np.ndarray, text: BlockText, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Return the block's part of every aggregate of a layer, by its name in the part's file.

    The names are those of `histogram`, ``moments/`` those of `moments`, and ``top/`` those of
    `top_examples`.
    """
    moment = moments(neurons_TK, values_TK, sizes.width)
    top = top_examples(neurons_TK, values_TK, text, sizes)
    return {
        **histogram(neurons_TK, values_TK, text.tokens, sizes),
        **{f"moments/{name}": array for name, array in moment.items()},
        **{f"top/{name}": array for name, array in top.items()},
    }


def histogram(
    neurons_TK: np.ndarray, values_TK: np.ndarray, tokens_T: np.ndarray, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Count the activations and add the mass of every (neuron, token) pair that occurs.

    Returns:
        keys int64 (``neuron * V + token``, ascending), counts int32 and mass float64.
    """
    keys = neurons_TK.astype(np.int64)
    keys *= sizes.vocab_size
    keys += tokens_T[:, None]
    keys, values = keys.ravel(), values_TK.ravel()
    if not values.all():
        kept = values != 0
        keys, values = keys[kept], values[kept]
    mass = np.abs(values)
    pairs = sizes.width * sizes.vocab_size
    if pairs <= DENSE_PAIRS:
        counts = np.bincount(keys, minlength=pairs)
        sums = np.bincount(keys, weights=mass, minlength=pairs)
        found = np.flatnonzero(counts)
        return {"keys": found, "counts": counts[found].astype(np.int32), "mass": sums[found]}
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse.ravel(), weights=mass, minlength=len(found))
    return {"keys": found, "counts": counts.astype(np.int32), "mass": sums}


def moments(neurons_TK: np.ndarray, values_TK: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Return count, sum, sum of squares (float64), max and min (float32) of every neuron [N]."""
    neurons, values = neurons_TK.ravel().astype(np.int64), values_TK.ravel()
    if not values.all():
        kept = values != 0
        neurons, values = neurons[kept], values[kept]
    largest = np.full(width, -np.inf, dtype=np.float32)
    smallest = np.full(width, np.inf, dtype=np.float32)
    np.maximum.at(largest, neurons, values)
    np.minimum.at(smallest, neurons, values)
    exact = values.astype(np.float64)
    return {
        "count": np.bincount(neurons, minlength=width),
        "sum": np.bincount(neurons, weights=exact, minlength=width),
        "sum_squares": np.bincount(neurons, weights=exact * exact, minlength=width),
        "max": largest,
        "min": smallest,
    }


def strongest(
    neurons: np.ndarray, strengths: np.ndarray, sizes: Sizes, *arrays: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Keep the top_n strongest entries of every neuron, sorted by neuron and rank.

    Entries of one neuron must come in the order of their positions, which equal strengths keep.

    Returns:
        neurons, strengths and the other arrays, with only the entries that are kept.
    """
    order = np.lexsort((-strengths, neurons))
    ordered = neurons[order]
    starts = np.searchsorted(ordered, np.arange(sizes.width))
    kept = order[np.arange(len(order)) - starts[ordered] < sizes.top_n]
    return (neurons[kept], strengths[kept], *(array[kept] for array in arrays))


def top_examples(
    neurons_TK: np.ndarray, values_TK: np.ndarray, text: BlockText, sizes: Sizes
) -> dict[str, np.ndarray]:
    """Find the top_n strongest activations of every neuron in the block, with their windows.

    Returns:
        neuron, value, position, document and token [E]; context int32 [E, W] with -1 where the
        window ends early; values float32 [E, W].
    """
    num_tokens, k = neurons_TK.shape
    neurons = np.zeros(0, np.int64)
    strengths = np.zeros(0, np.float32)
    rows = np.zeros(0, np.int64)
    threshold = np.full(sizes.width, -np.inf, dtype=np.float32)
    # Thresholds from a short beginning leave few candidates in the long rest.
    edges = [0, *(num_tokens // part for part in (64, 16, 4) if num_tokens // part), num_tokens]
    for begin, end in itertools.pairwise(edges):
        new = neurons_TK[begin:end].ravel().astype(np.int64)
        strength = sizes.strength(values_TK[begin:end].ravel())
        real = values_TK[begin:end].ravel() != 0
        chosen = np.flatnonzero(real & (strength > threshold[new]))
        neurons, strengths, rows = strongest(
            np.concatenate([neurons, new[chosen]]),
            np.concatenate([strengths, strength[chosen]]),
            sizes,
            np.concatenate([rows, begin + chosen // k]),
        )
        counts = np.bincount(neurons, minlength=sizes.width)
        last = np.cumsum(counts) - 1
        full = counts == sizes.top_n
        threshold[full] = strengths[last[full]]
    return _windows(neurons, rows, neurons_TK, values_TK, text, sizes)


def _windows(
    neurons: np.ndarray,
    rows: np.ndarray,
    neurons_TK: np.ndarray,
    values_TK: np.ndarray,
    text: BlockText,
    sizes: Sizes,
) -> dict[str, np.ndarray]:
    offsets = np.arange(-sizes.before, sizes.after + 1)
    where_EW = rows[:, None] + offsets
    inside = (where_EW >= 0) & (where_EW < len(text.tokens))
    where_EW = np.where(inside, where_EW, 0)
    inside &= where_EW // text.seq_length == (rows // text.seq_length)[:, None]
    inside &= text.documents[where_EW] == text.documents[rows][:, None]
    values_EW = np.empty(where_EW.shape, dtype=np.float32)
    for begin in range(0, len(rows), _WINDOW_CHUNK):
        part = slice(begin, begin + _WINDOW_CHUNK)
        same = neurons_TK[where_EW[part]] == neurons[part, None, None].astype(neurons_TK.dtype)
        place = same.argmax(axis=-1)
        found = np.take_along_axis(same, place[..., None], -1)[..., 0] & inside[part]
        values_EW[part] = np.where(found, values_TK[where_EW[part], place], 0)
    return {
        "neuron": neurons.astype(np.int32),
        "value": values_EW[:, sizes.before].copy(),
        "position": text.first + rows,
        "document": text.documents[rows],
        "token": text.tokens[rows].astype(np.int32),
        "context": np.where(inside, text.tokens[where_EW], -1).astype(np.int32),
        "values": values_EW,
    }
