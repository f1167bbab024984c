"""Columns of the tables of a study, as docs/analysis.md promises them, and how they are written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing

COMPRESSION = "zstd"
_LEVEL = 1

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


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file in one step."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression=COMPRESSION, compression_level=_LEVEL)


def write_parts(path: Path, schema: pa.Schema, parts: Iterable[pa.Table], **options: Any) -> None:
    """Write a Parquet file of several tables, each a row group of its own, in one step."""
    options = {"compression": COMPRESSION, "compression_level": _LEVEL, **options}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for part in parts:
            if part.num_rows:
                writer.write_table(part, row_group_size=part.num_rows)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Raises:
        AnalysisError: it is missing or damaged.
    """
    if not path.is_file():
        raise AnalysisError(f"{path} is missing; run the command that writes it first")
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise AnalysisError(
            f"{path} is damaged ({str(error).splitlines()[0]}); delete it and run the command that "
            "wrote it again"
        ) from error
