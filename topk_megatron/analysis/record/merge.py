"""Adds the parts of all blocks, in their order and layer by layer, and writes the run's tables.

Memory holds a table of (neuron, token) pairs for as many neurons as fit into `_PAIRS`, and the part
of one block at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.corpus import Corpus, token_texts
from topk_megatron.analysis.record.block import Sizes, strongest
from topk_megatron.analysis.record.parts import LayerParts
from topk_megatron.analysis.tables import read_table, write_parts, write_table

VOCABULARY = pa.schema([("token", pa.int32()), ("text", pa.string()), ("count", pa.int64())])
NEURONS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("count", pa.int64()),
        ("mass", pa.float64()),
        ("sum", pa.float64()),
        ("sum_squares", pa.float64()),
        ("max", pa.float32()),
        ("min", pa.float32()),
    ]
)
HISTOGRAM = pa.schema(
    [("neuron", pa.int32()), ("token", pa.int32()), ("count", pa.int64()), ("mass", pa.float64())]
)
EXAMPLES = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("rank", pa.int16()),
        ("value", pa.float32()),
        ("position", pa.int64()),
        ("document", pa.int32()),
        ("token", pa.int32()),
        ("context", pa.list_(pa.int32())),
        ("target", pa.int16()),
        ("values", pa.list_(pa.float32())),
    ]
)
BLOCKS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("block", pa.int32()),
        ("token", pa.int32()),
        ("count", pa.int64()),
        ("mass", pa.float64()),
    ]
)
# Entries of the dense tables of counts and mass, 8 bytes each.
_PAIRS = 1 << 24
_ROW_GROUP = 1 << 18
_TOP = ("neuron", "value", "position", "document", "token", "context", "values")
_MOMENTS = ("count", "sum", "sum_squares", "max", "min")


def merge_layer(directory: Path, plan: dict[str, Any], layer: int, sizes: Sizes) -> None:
    """Write the histograms, moments, examples and block histograms of one layer.

    The last three go to ``parts/``; `merge_run` makes one file of all layers from each.
    """
    of_layer = LayerParts(directory, plan["blocks"], layer)
    mass = np.zeros(sizes.width)
    chosen = np.random.default_rng([layer, 0]).permutation(sizes.width)[: plan["bootstrap_neurons"]]
    aside = directory / "parts"
    # Each table is computed when its turn to be written comes: moments need the histograms' mass.
    tables = {
        directory / "histograms" / f"layer-{layer:03d}.parquet": (
            HISTOGRAM,
            _histograms(of_layer, sizes, mass),
        ),
        aside / f"neurons-{layer:03d}.parquet": (NEURONS, _neurons(of_layer, layer, sizes, mass)),
        aside / f"examples-{layer:03d}.parquet": (EXAMPLES, _examples(of_layer, layer, sizes)),
        aside / f"blocks-{layer:03d}.parquet": (
            BLOCKS,
            _blocks(of_layer, layer, sizes, np.sort(chosen)),
        ),
    }
    for path, (schema, rows) in tables.items():
        write_parts(path, schema, rows)


def merge_run(directory: Path, plan: dict[str, Any], tokenizer: Any, corpus: Corpus) -> None:
    """Join the tables of all layers, and write the vocabulary."""
    vocab_size = plan["model"]["vocab_size"]
    columns = [
        np.arange(vocab_size, dtype=np.int32),
        token_texts(tokenizer, vocab_size),
        corpus.counts(vocab_size),
    ]
    kinds = (("neurons", NEURONS), ("examples", EXAMPLES), ("blocks", BLOCKS))
    for name, schema in kinds:
        files = [directory / "parts" / f"{name}-{layer:03d}.parquet" for layer in plan["layers"]]
        layers = (read_table(file) for file in files)
        write_parts(directory / f"{name}.parquet", schema, layers)
    write_table(directory / "vocabulary.parquet", pa.table(columns, schema=VOCABULARY))


def _histograms(of_layer: LayerParts, sizes: Sizes, mass_of: np.ndarray) -> Iterator[pa.Table]:
    """Yield row groups of whole neurons; fill `mass_of` [N] on the way."""
    vocab = sizes.vocab_size
    step = max(1, _PAIRS // vocab)
    for begin in range(0, sizes.width, step):
        end = min(begin + step, sizes.width)
        counts = np.zeros((end - begin) * vocab, dtype=np.int64)
        mass = np.zeros((end - begin) * vocab)
        for part in of_layer("keys", "counts", "mass"):
            low, high = np.searchsorted(part["keys"], (begin * vocab, end * vocab))
            keys = part["keys"][low:high] - begin * vocab
            counts[keys] += part["counts"][low:high]  # keys of a part are distinct
            mass[keys] += part["mass"][low:high]
        keys = np.flatnonzero(counts)
        neurons = (begin + keys // vocab).astype(np.int32)
        mass_of += np.bincount(neurons, weights=mass[keys], minlength=sizes.width)
        columns = [neurons, (keys % vocab).astype(np.int32), counts[keys], mass[keys]]
        yield from _whole_neurons(columns, neurons)


def _whole_neurons(columns: list[np.ndarray], neurons: np.ndarray) -> Iterator[pa.Table]:
    begin = 0
    while begin < len(neurons):
        end = min(begin + _ROW_GROUP, len(neurons))
        if end < len(neurons):
            cut = int(np.searchsorted(neurons, neurons[end]))
            # A neuron with more tokens than fit into a row group gets a longer one of its own.
            end = cut if cut > begin else int(np.searchsorted(neurons, neurons[end], "right"))
        yield pa.table([column[begin:end] for column in columns], schema=HISTOGRAM)
        begin = end


def _neurons(
    of_layer: LayerParts, layer: int, sizes: Sizes, mass: np.ndarray
) -> Iterator[pa.Table]:
    count = np.zeros(sizes.width, dtype=np.int64)
    sums, squares = np.zeros(sizes.width), np.zeros(sizes.width)
    largest = np.full(sizes.width, -np.inf, dtype=np.float32)
    smallest = np.full(sizes.width, np.inf, dtype=np.float32)
    for part in of_layer(*(f"moments/{name}" for name in _MOMENTS)):
        count += part["moments/count"]
        sums += part["moments/sum"]
        squares += part["moments/sum_squares"]
        np.maximum(largest, part["moments/max"], out=largest)
        np.minimum(smallest, part["moments/min"], out=smallest)
    silent = count == 0
    columns = [
        np.full(sizes.width, layer, np.int16),
        np.arange(sizes.width, dtype=np.int32),
        *(count, mass, sums, squares),
        *(pa.array(extreme, mask=silent) for extreme in (largest, smallest)),
    ]
    yield pa.table(columns, schema=NEURONS)


def _examples(of_layer: LayerParts, layer: int, sizes: Sizes) -> Iterator[pa.Table]:
    best: dict[str, np.ndarray] | None = None
    for stored in of_layer(*(f"top/{name}" for name in _TOP)):
        part = {name: stored[f"top/{name}"] for name in _TOP}
        if best is not None:
            part = {name: np.concatenate([best[name], part[name]]) for name in _TOP}
        strength = sizes.strength(part["value"])
        rows = np.arange(len(strength))
        neurons = part["neuron"].astype(np.int64)
        kept = strongest(neurons, strength, sizes, rows)[2]
        best = {name: part[name][kept] for name in _TOP}
    assert best is not None
    yield _example_table(best, layer, sizes)


def _example_table(best: dict[str, np.ndarray], layer: int, sizes: Sizes) -> pa.Table:
    neurons = best["neuron"]
    starts = np.searchsorted(neurons, np.arange(sizes.width))
    inside = best["context"] >= 0
    lengths = inside.sum(axis=1)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    context = pa.ListArray.from_arrays(ends, best["context"][inside])
    values = pa.ListArray.from_arrays(ends, best["values"][inside])
    columns = [
        np.full(len(neurons), layer, np.int16),
        neurons,
        (np.arange(len(neurons)) - starts[neurons]).astype(np.int16),
        *(best["value"], best["position"], best["document"], best["token"], context),
        inside[:, : sizes.before].sum(axis=1).astype(np.int16),
        values,
    ]
    return pa.table(columns, schema=EXAMPLES)


def _blocks(
    of_layer: LayerParts, layer: int, sizes: Sizes, chosen: np.ndarray
) -> Iterator[pa.Table]:
    found: list[list[np.ndarray]] = []
    for block, part in enumerate(of_layer("keys", "counts", "mass")):
        kept = np.isin(part["keys"] // sizes.vocab_size, chosen)
        keys = part["keys"][kept]
        found.append(
            [
                (keys // sizes.vocab_size).astype(np.int32),
                np.full(len(keys), block, np.int32),
                (keys % sizes.vocab_size).astype(np.int32),
                part["counts"][kept].astype(np.int64),
                part["mass"][kept],
            ]
        )
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    sorted_columns = [column[order] for column in columns]
    layers = np.full(len(order), layer, np.int16)
    yield pa.table([layers, *sorted_columns], schema=BLOCKS)
