"""Files that each block writes: its part of the aggregates, and its single activations.

Legend: T tokens of the block, K survivors per token.
"""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.record.block import BlockText
from topk_megatron.analysis.tables import write_parts, write_table
from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, zlib.error)
ACTIVATIONS = pa.schema(
    [
        ("run", pa.dictionary(pa.int32(), pa.string())),
        ("layer", pa.int16()),
        ("position", pa.int64()),
        ("document", pa.int32()),
        ("neuron", pa.int32()),
        ("value", pa.float32()),
    ]
)
TOKENS = pa.schema([("position", pa.int64()), ("document", pa.int32()), ("token", pa.int32())])


def part_path(directory: Path, block: int) -> Path:
    """Return where the aggregates of a block are until all blocks are merged."""
    return directory / "parts" / f"block-{block:06d}.npz"


def is_whole(path: Path) -> bool:
    """Return whether a part is there and was written to its end."""
    if not path.exists():
        return False
    with contextlib.suppress(*_DAMAGE), zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
    return False


def write(path: Path, found: dict[int, dict[str, np.ndarray]]) -> None:
    """Write the aggregates of a block, by layer and name, in one step."""
    arrays = {f"{layer}/{name}": a for layer, own in found.items() for name, a in own.items()}
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


class LayerParts:
    """The aggregates of one layer, by block."""

    def __init__(self, directory: Path, blocks: int, layer: int) -> None:
        """Name the parts; nothing is read yet.

        Args:
            directory: the run's folder.
            blocks: how many blocks the run has.
            layer: the layer whose arrays to read.
        """
        self._paths = [part_path(directory, block) for block in range(blocks)]
        self._layer = layer

    def __call__(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield the named arrays of each block in turn.

        Raises:
            AnalysisError: a part is damaged.
        """
        for path in self._paths:
            try:
                with np.load(path) as archive:
                    part = {name: archive[f"{self._layer}/{name}"] for name in names}
            except _DAMAGE as error:
                raise AnalysisError(
                    f"{path} is damaged ({error}); delete it and repeat the command: the other "
                    "blocks are kept"
                ) from error
            yield part


def write_activations(
    directory: Path,
    block: int,
    run: str,
    text: BlockText,
    states: dict[int, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write one block's activations, one row group per layer, and its tokens.

    Args:
        directory: the run's folder.
        block: the block's number.
        run: name of the run.
        text: the block's tokens.
        states: by layer, values float32 [T, K] and neurons [T, K].
    """
    name = f"block-{block:06d}.parquet"
    positions = text.first + np.arange(len(text.tokens))
    layers = (_layer(run, n, positions, text.documents, *pair) for n, pair in states.items())
    columns = [positions, text.documents, text.tokens.astype(np.int32)]
    write_table(directory / "tokens" / name, pa.table(columns, schema=TOKENS))
    write_parts(
        directory / "activations" / name,
        ACTIVATIONS,
        layers,
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
    return pa.table([names, layers, *columns], schema=ACTIVATIONS)
