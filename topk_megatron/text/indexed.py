"""Reads the index (``.idx``) of a Megatron dataset, without Megatron.

An index holds a header (magic, version, dtype code, number of sequences and of documents), then the
length of every sequence (int32), its offset in the ``.bin`` file (int64, in bytes), and the first
sequence of every document and the end (int64). See megatron/core/datasets/indexed_dataset.py.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topk_megatron.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}


@dataclass(frozen=True)
class DatasetIndex:
    """The content of an index; its arrays are mapped and read when they are used.

    Attributes:
        dtype: type of the token ids in the ``.bin`` file.
        lengths: int32 [sequences], in tokens.
        offsets: int64 [sequences], in bytes.
        documents: int64 [documents + 1], the first sequence of each document, and the end.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def read_index(path: Path) -> DatasetIndex:
    """Open an index and check its size.

    Raises:
        DataError: the file is not a Megatron index, or it is cut off.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(
            f"{path} is not a Megatron dataset index; make it again with tools/preprocess_data.py"
        )
    _, _, code, sequences, documents = _HEADER.unpack(header)
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if code not in _DTYPES or path.stat().st_size < expected:
        raise DataError(
            f"{path} is damaged or shorter than its header says; make the dataset again"
        )
    content = np.memmap(path, mode="r")
    lengths, offset = _HEADER.size, _HEADER.size + 4 * sequences
    return DatasetIndex(
        dtype=_DTYPES[code],
        lengths=np.frombuffer(content, "<i4", sequences, lengths),
        offsets=np.frombuffer(content, "<i8", sequences, offset),
        documents=np.frombuffer(content, "<i8", documents, offset + 8 * sequences),
    )
