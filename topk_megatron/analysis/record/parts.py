"""Files of a run that is under way: the aggregates of one block, and its activations."""

import contextlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from topk_megatron.analysis import tables
from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, zlib.error)


def part_path(directory: Path, block: int) -> Path:
    """Where the aggregates of a block lie until all are merged."""
    return directory / "parts" / f"block-{block:06d}.npz"


def is_whole(path: Path) -> bool:
    """A part that a killed run left behind can be used."""
    if not path.exists():
        return False
    with contextlib.suppress(*_DAMAGE), zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
    return False


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a part in one step."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


def read(path: Path, layer: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of one layer of a part.

    Raises:
        AnalysisError: the part is damaged.
    """
    try:
        with np.load(path) as archive:
            return {name: archive[f"{layer}/{name}"] for name in names}
    except _DAMAGE as error:
        raise AnalysisError(
            f"{path} is damaged ({error}); delete it and give the command again: the other blocks "
            "are kept"
        ) from error


def write_activations(
    path: Path,
    run: str,
    positions: np.ndarray,
    documents: np.ndarray,
    states: dict[int, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write one block's activations, a row group a layer.

    Args:
        path: the Parquet file.
        run: name of the run.
        positions: int64 [T].
        documents: int32 [T].
        states: by layer, values float32 [T, K] and neurons [T, K].
    """
    tables.write_parts(
        path,
        tables.ACTIVATIONS,
        (_layer(run, layer, positions, documents, *pair) for layer, pair in states.items()),
        use_dictionary=["run"],
        column_encoding={
            "layer": "DELTA_BINARY_PACKED",
            "position": "DELTA_BINARY_PACKED",
            "document": "DELTA_BINARY_PACKED",
            "neuron": "DELTA_BINARY_PACKED",
            "value": "PLAIN",
        },
        write_statistics=["layer", "position", "document"],
    )


def _layer(
    run: str,
    layer: int,
    positions: np.ndarray,
    documents: np.ndarray,
    values_TK: np.ndarray,
    neurons_TK: np.ndarray,
) -> pa.Table:
    k = values_TK.shape[1]
    columns = [np.repeat(positions, k), np.repeat(documents, k)]
    columns += [neurons_TK.ravel().astype(np.int32), values_TK.ravel()]
    kept = columns[-1] != 0
    if not kept.all():
        columns = [column[kept] for column in columns]
    rows = len(columns[0])
    names = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([run]))
    layers = np.full(rows, layer, np.int16)
    return pa.table([names, layers, *columns], schema=tables.ACTIVATIONS)
