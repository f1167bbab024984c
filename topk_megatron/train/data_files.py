"""Checks dataset files before Megatron opens them: present, well formed, enough documents."""

import json
from argparse import Namespace
from pathlib import Path

from topk_megatron.errors import DataError
from topk_megatron.text.indexed import read_index
from topk_megatron.text.preprocess import MANIFEST
from topk_megatron.text.tokenizer import fingerprint

_PARTS = ("train", "validation", "test")


def check_data_files(args: Namespace) -> None:
    """Refuse missing or damaged dataset files, and splits that leave a part without a document.

    Raises:
        DataError: names the file and what to do.
    """
    shared = _prefixes(args.data_path or _entries_of(args.data_args_path))
    separate = [args.train_data_path, args.valid_data_path, args.test_data_path]
    for prefix in (*shared, *(prefix for paths in separate for prefix in _prefixes(paths))):
        documents = count_documents(prefix)
        _check_tokenizer(prefix, args.tokenizer_model)
        if prefix in shared:
            _check_split(prefix, documents, args)


def count_documents(prefix: str) -> int:
    """Count the documents of a dataset, and check that its two files belong together.

    Raises:
        DataError: a file is missing or damaged, or the dataset is empty.
    """
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise DataError(
                f"dataset file {prefix}{suffix} does not exist; make it with "
                "tools/preprocess_data.py and give the path without .bin"
            )
    index = read_index(Path(f"{prefix}.idx"))
    if not len(index.lengths):
        raise DataError(f"{prefix} holds no document")
    # Reading the last sequence alone is quick, however large the dataset is.
    expected = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    size = Path(f"{prefix}.bin").stat().st_size
    if size != expected:
        raise DataError(
            f"{prefix}.bin has {size} bytes where its index says {expected}; make the dataset again"
        )
    return len(index.lengths)


def _check_tokenizer(prefix: str, tokenizer_model: str | None) -> None:
    """Compare with the manifest that our preprocessing leaves next to the data, if there is one."""
    manifest = Path(f"{prefix}{MANIFEST}")
    if tokenizer_model is None or not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text())["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError):
        return  # another tool's file
    if expected != fingerprint(tokenizer_model):
        raise DataError(
            f"{prefix} was tokenized with another tokenizer than {tokenizer_model} (their SHA-256 "
            f"differ, see {manifest}); give that one, or tokenize the text again"
        )


def _check_split(prefix: str, documents: int, args: Namespace) -> None:
    """Refuse a part without documents, in which Megatron would search for samples forever."""
    weights = split_weights(args.split or "969,30,1")
    total = sum(weights)
    wanted = (True, bool(args.eval_iters), bool(args.eval_iters))
    start = 0.0
    for part, weight, needed in zip(_PARTS, weights, wanted, strict=False):
        end = start + weight
        count = round(end / total * documents) - round(start / total * documents)
        if needed and weight > 0 and count < 1:
            raise DataError(
                f"--split {args.split or '969,30,1'} leaves the {part} part of {prefix} "
                f"({documents} documents) without a document; give it more weight, such as "
                "--split 90,5,5, or 0"
            )
        start = end


def split_weights(split: str) -> list[float]:
    """Read ``90,8,2`` or ``90/8/2`` as three weights; missing ones are zero.

    Raises:
        DataError: the text is not one to three weights that are not negative.
    """
    try:
        weights = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError as error:
        raise DataError(f"--split takes numbers such as 90,8,2, got {split!r}") from error
    if len(weights) > len(_PARTS) or any(weight < 0 for weight in weights) or not sum(weights):
        raise DataError(f"--split takes up to three weights that are not negative, got {split!r}")
    return weights + [0.0] * (len(_PARTS) - len(weights))


def _entries_of(file: str | None) -> list[str] | None:
    """Return the entries of the file given as ``--data-args-path``."""
    if file is None:
        return None
    if not Path(file).is_file():
        raise DataError(f"--data-args-path {file} does not exist")
    return Path(file).read_text().split()


def _prefixes(entries: list[str] | None) -> list[str]:
    """Return the dataset prefixes on this machine, without the weights between them."""
    return [entry for entry in entries or [] if not _is_number(entry) and "://" not in entry]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
