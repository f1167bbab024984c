"""Reads documents from text files: one per .txt or .md file, one per line of .jsonl.

Each file may be compressed (.gz, .zst). Everything is streamed, and the error for a bad line names
its file and number.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from topk_megatron.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file holds it.

    Attributes:
        data: UTF-8 bytes; the whole file for text, one line for JSON lines.
        path: the file.
        line: the line in the file, from 1; 0 for a whole file.
        position: bytes of the file read so far, on disk (compressed).
    """

    data: bytes
    path: str
    line: int
    position: int


class BadLineError(ValueError):
    """A record holds no document; the message says why."""


def expand(patterns: Sequence[str]) -> list[Path]:
    """Resolve files and globs (``data/**/*.jsonl``) to a sorted list without duplicates.

    Raises:
        DataError: a pattern matches nothing, or a file type is unknown.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(p) for p in glob.glob(pattern, recursive=True)]
        if not matches and Path(pattern).exists():
            matches = [Path(pattern)]  # a file name with brackets
        files = [path for path in matches if path.is_file()]
        if not files:
            raise DataError(f"no file matches {pattern!r}")
        found.update(files)
    for path in found:
        _kind(path)
    return sorted(found)


def read_records(path: Path) -> Iterator[Record]:
    """Stream the records of one file; a JSON-lines file yields its non-empty lines.

    Raises:
        DataError: the file cannot be read or decompressed.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            if _kind(path) in TEXT_SUFFIXES:
                yield Record(stream.read(), str(path), 0, raw.tell())
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield Record(line, str(path), number, raw.tell())
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def document(record: Record, json_key: str) -> str:
    """Return the text of a record.

    Raises:
        BadLineError: the record is not UTF-8 or not JSON, or the key is missing or not text.
    """
    try:
        if record.line == 0:
            return record.data.decode()
        entry = json.loads(record.data)
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON ({error})") from error
    if not isinstance(entry, dict) or json_key not in entry:
        raise BadLineError(f"no key {json_key!r}")
    text = entry[json_key]
    if not isinstance(text, str):
        raise BadLineError(f"key {json_key!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLineError(f"half a surrogate pair (character {error.start})") from error
    return text


def read_texts(patterns: Sequence[str], json_key: str = "text") -> Iterator[str]:
    """Yield the texts of files and globs.

    Raises:
        DataError: nothing matches, or a record is bad; names its file and line.
    """
    for path in expand(patterns):
        for record in read_records(path):
            try:
                yield document(record, json_key)
            except BadLineError as error:
                raise DataError(f"{record.path}:{record.line}: {error}") from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    if kind not in known:
        raise DataError(
            f"{path}: the file type {kind or '(none)'} is not known; use {', '.join(known)}, "
            f"each also with {' or '.join(_COMPRESSED)}"
        )
    return kind


@contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(raw) as stream:
            yield cast(BinaryIO, stream)
    elif suffix == ".zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        with decompressor.stream_reader(raw, read_across_frames=True, closefd=False) as stream:
            yield cast(BinaryIO, io.BufferedReader(stream))  # pyright: ignore[reportArgumentType]
    else:
        yield raw


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return OSError
    return zstandard.ZstdError
