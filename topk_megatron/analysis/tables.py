"""Parquet files of a study, and the columns that the tables of several commands share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topk_megatron.analysis.measures import Interval
from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing

COMPRESSION = "zstd"
_LEVEL = 1

# The `layer` of rows about all recorded layers together. ALL_LAYERS in web/report/assets/plots.js
# is the same number.
ALL_LAYERS = -1
# What `interval_columns` fills.
INTERVAL = [
    ("neurons", pa.int64()),
    ("mean", pa.float64()),
    ("low", pa.float64()),
    ("high", pa.float64()),
]


def interval_columns(interval: Interval) -> dict[str, Any]:
    """Return the columns `INTERVAL` of a row about a mean over neurons."""
    return {
        "neurons": interval.n,
        "mean": interval.value,
        "low": interval.low,
        "high": interval.high,
    }


def percentile_columns(values: np.ndarray, percentiles: Sequence[int]) -> dict[str, float]:
    """Return the columns ``p10``, ``p50``, … of a row about these values."""
    return {f"p{p}": float(np.percentile(values, p)) for p in percentiles}


def nullable(values: np.ndarray) -> pa.Array:
    """Return a float64 column in which NaN is null."""
    return pa.array(np.asarray(values, np.float64), mask=np.isnan(values))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file in one step."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression=COMPRESSION, compression_level=_LEVEL)


def write_parts(path: Path, schema: pa.Schema, parts: Iterable[pa.Table], **options: Any) -> None:
    """Write a Parquet file in one step from several tables, each a row group of its own."""
    options = {"compression": COMPRESSION, "compression_level": _LEVEL, **options}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for part in parts:
            if part.num_rows:
                writer.write_table(part, row_group_size=part.num_rows)


def read_table(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: the file.
        columns: the columns to read; None reads all.
        filters: the rows to read, as a pyarrow expression; None reads all.

    Raises:
        AnalysisError: the file is missing or damaged.
    """
    if not path.is_file():
        raise AnalysisError(f"{path} is missing; run the command that writes it first")
    try:
        if filters is not None:
            return pq.read_table(path, columns=columns, filters=filters)
        return pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise AnalysisError(
            f"{path} is damaged ({str(error).splitlines()[0]}); delete it and run the command that "
            "wrote it again"
        ) from error
