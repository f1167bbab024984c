"""Tokenizes documents into Megatron's ``.bin``/``.idx`` with several processes, in input order.

Files are written under hidden temporary names and renamed at the end, the index last. Even after a
kill, a dataset that has its ``.idx`` is complete.
"""

import contextlib
import functools
import glob
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from topk_megatron.errors import DataError
from topk_megatron.text.reading import BadLineError, Record, document, expand, read_records
from topk_megatron.text.tokenizer import fingerprint, open_tokenizer

# Not plain .json, which inputs have too. An input of this name is refused.
MANIFEST = ".manifest.json"
SUFFIXES = (".bin", ".idx", MANIFEST)
# Bytes of text per task of a worker: large enough to hide the transfer, small enough for a smooth
# progress bar.
_CHUNK_BYTES = 256 * 1024
_CHUNKS_IN_FLIGHT_PER_WORKER = 4
_REPORTED_BAD_LINES = 20


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to tokenize and how.

    Attributes:
        inputs: text files or globs.
        output: path prefix; writes ``output.bin``, ``output.idx``, ``output.manifest.json``.
        tokenizer_type: ``SentencePieceTokenizer`` or ``HuggingFaceTokenizer``.
        tokenizer_model: the tokenizer's file or directory.
        json_key: key of the text in JSON lines.
        append_eod: whether every document ends with the end-of-document token.
        workers: number of tokenizing processes; 0 tokenizes in this process.
        skip_bad_lines: whether to skip bad lines instead of failing at the end.
        overwrite: whether to replace an existing dataset.
    """

    inputs: list[str]
    output: Path
    tokenizer_type: str
    tokenizer_model: str
    json_key: str = "text"
    append_eod: bool = True
    workers: int = 1
    skip_bad_lines: bool = False
    overwrite: bool = False


@dataclass
class Summary:
    """The number of documents, bytes of text and tokens read and written."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    bad_lines: int = 0
    first_bad_lines: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A worker's result for one chunk of records."""

    documents: list[np.ndarray]
    empty: int
    text_bytes: int
    bad_lines: list[str]


def preprocess(config: PreprocessConfig) -> Summary:
    """Tokenize `config.inputs` into one dataset.

    Raises:
        DataError: the input cannot be read, has a bad line without `skip_bad_lines` or no document
            at all, the output exists, or the disk is full. No partial dataset is left behind.
    """
    files = expand(config.inputs)
    _check_output(config, files)
    tokenizer = open_tokenizer(config.tokenizer_type, config.tokenizer_model)
    if config.append_eod and tokenizer.eod is None:
        raise DataError(
            f"{config.tokenizer_model} has no end-of-sentence token to end documents with; "
            "add one, or use --no-eod"
        )
    temporary = config.output.with_name(f".{config.output.name}.partial-{os.getpid()}")
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(config.output)
        summary = _write_dataset(config, files, temporary, tokenizer)
        _fail_on_bad_lines(config, summary)
        _publish(config, temporary, summary, tokenizer)
    except OSError as error:
        raise DataError(f"cannot write {config.output}: {error}") from error
    finally:
        for suffix in SUFFIXES:
            with contextlib.suppress(OSError):
                temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
    return summary


def _remove_leftovers(output: Path) -> None:
    """Delete the partial files of killed runs."""
    for partial in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        pid = partial.name.rsplit("-", 1)[-1].split(".")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            partial.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_output(config: PreprocessConfig, files: list[Path]) -> None:
    if not config.output.name:
        raise DataError(f"--output-prefix must end in a name, got {str(config.output)!r}")
    inputs = {path.resolve() for path in files}
    for suffix in SUFFIXES:
        output = Path(f"{config.output}{suffix}")
        if output.resolve() in inputs:
            raise DataError(f"{output} is an input; choose another --output-prefix")
        if output.exists() and not config.overwrite:
            raise DataError(f"{output} exists; choose another --output-prefix or use --overwrite")


def _write_dataset(
    config: PreprocessConfig, files: list[Path], temporary: Path, tokenizer: Any
) -> Summary:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    summary = Summary()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=dtype)
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5)
    encode = functools.partial(_encode, config.json_key, config.append_eod)
    try:
        with bar, _workers(config) as submit:
            chunks = _chunks(files, bar.update)
            limit = max(1, config.workers) * _CHUNKS_IN_FLIGHT_PER_WORKER
            for encoded in _in_order(chunks, functools.partial(submit, encode), limit):
                for ids in encoded.documents:
                    builder.add_document(ids, [len(ids)])  # pyright: ignore[reportArgumentType]
                _add(summary, encoded)
                elapsed = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(f"{summary.tokens / elapsed:,.0f} tokens/s", refresh=False)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory?); use fewer --workers or smaller documents"
        ) from error
    builder.finalize(f"{temporary}.idx")
    return summary


@contextlib.contextmanager
def _workers(config: PreprocessConfig) -> Iterator[Callable[..., Future[_Encoded]]]:
    """Yield a `submit` function that uses worker processes or, if workers = 0, this process."""
    if config.workers == 0:
        _open_in_worker(config.tokenizer_type, config.tokenizer_model)
        yield _run_here
        return
    with ProcessPoolExecutor(
        config.workers,
        initializer=_start_worker,
        initargs=(config.tokenizer_type, config.tokenizer_model, os.getpid()),
    ) as pool:
        try:
            yield lambda encode, chunk: pool.submit(encode, chunk)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_here(encode: Callable[[list[Record]], _Encoded], chunk: list[Record]) -> Future[_Encoded]:
    future: Future[_Encoded] = Future()
    future.set_result(encode(chunk))
    return future


def _in_order(
    chunks: Iterable[list[Record]],
    submit: Callable[[list[Record]], Future[_Encoded]],
    limit: int,
) -> Iterator[_Encoded]:
    """Map with at most `limit` chunks in flight, so that a fast reader cannot fill the memory."""
    waiting: deque[Future[_Encoded]] = deque()
    for chunk in chunks:
        waiting.append(submit(chunk))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(files: list[Path], advance: Callable[[int], Any]) -> Iterator[list[Record]]:
    """Group records to about `_CHUNK_BYTES`, and report progress in bytes on disk."""
    chunk: list[Record] = []
    size = 0
    for path in files:
        position = 0
        for record in read_records(path):
            advance(record.position - position)
            position = record.position
            chunk.append(record)
            size += len(record.data)
            if size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


_tokenizer: Any = None


def _open_in_worker(tokenizer_type: str, tokenizer_model: str) -> None:
    global _tokenizer
    _tokenizer = open_tokenizer(tokenizer_type, tokenizer_model)


def _start_worker(tokenizer_type: str, tokenizer_model: str, parent: int) -> None:
    # If the parent is killed, a worker would otherwise wait for work forever.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _open_in_worker(tokenizer_type, tokenizer_model)


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(json_key: str, append_eod: bool, records: list[Record]) -> _Encoded:
    documents: list[np.ndarray] = []
    bad_lines: list[str] = []
    empty = text_bytes = 0
    for record in records:
        try:
            text = document(record, json_key)
        except BadLineError as error:
            bad_lines.append(f"{record.path}:{record.line}: {error}")
            continue
        ids = _tokenizer.tokenize(text)
        if not ids:
            empty += 1
            continue
        text_bytes += len(text.encode(errors="surrogatepass"))
        documents.append(np.asarray([*ids, _tokenizer.eod] if append_eod else ids, dtype=np.int64))
    return _Encoded(documents, empty, text_bytes, bad_lines)


def _add(summary: Summary, encoded: _Encoded) -> None:
    summary.documents += len(encoded.documents)
    summary.empty_documents += encoded.empty
    summary.text_bytes += encoded.text_bytes
    summary.tokens += sum(len(ids) for ids in encoded.documents)
    summary.bad_lines += len(encoded.bad_lines)
    room = _REPORTED_BAD_LINES - len(summary.first_bad_lines)
    summary.first_bad_lines += encoded.bad_lines[:room]


def _fail_on_bad_lines(config: PreprocessConfig, summary: Summary) -> None:
    if summary.bad_lines and not config.skip_bad_lines:
        more = summary.bad_lines - len(summary.first_bad_lines)
        lines = "\n  ".join([*summary.first_bad_lines, *([f"and {more} more"] if more else [])])
        raise DataError(
            f"{summary.bad_lines} bad lines; fix them or use --skip-bad-lines:\n  {lines}"
        )
    if not summary.documents:
        raise DataError("the input holds no document with text in it")


def _publish(config: PreprocessConfig, temporary: Path, summary: Summary, tokenizer: Any) -> None:
    manifest = {
        **asdict(summary),
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "tokenizer_sha256": fingerprint(config.tokenizer_model),
        "vocab_size": tokenizer.vocab_size,
        "append_eod": config.append_eod,
    }
    Path(f"{temporary}{MANIFEST}").write_text(json.dumps(manifest, indent=2) + "\n")
    # The old index is removed first and the new one added last, so that an index never belongs to
    # other tokens.
    Path(f"{config.output}.idx").unlink(missing_ok=True)
    for suffix in (".bin", MANIFEST, ".idx"):
        os.replace(f"{temporary}{suffix}", f"{config.output}{suffix}")
