"""The text that neurons are studied on: one stream of token ids, cut into documents.

A Megatron dataset (``.bin``/``.idx``) is mapped into memory and never read as a whole; text files
go through the model's own tokenizer. Models see the stream in sequences of equal length, with
documents packed one after the other as in training. The last part turns tokens back into text.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.errors import DataError
from topk_megatron.files import read_object, sha256_of
from topk_megatron.text.indexed import read_index
from topk_megatron.text.reading import read_texts

_HASH_CHUNK = 1 << 22
# A piece that stands for one byte.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Corpus:
    """A stream of tokens.

    Attributes:
        path: where it came from, as the user gave it.
        kind: ``megatron`` or ``text``.
        tokens: int [tokens], the ids of all documents in a row.
        starts: int64 [documents + 1], the position of each document's first token, and the end.
        tokenizer_sha256: SHA-256 of the tokenizer that made a Megatron dataset; None if unknown.
    """

    path: str
    kind: str
    tokens: np.ndarray
    starts: np.ndarray
    tokenizer_sha256: str | None = None

    def documents_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of the document at each position, int32."""
        return (np.searchsorted(self.starts, positions, side="right") - 1).astype(np.int32)

    def sequences(self, first: int, last: int, length: int) -> np.ndarray:
        """Return the tokens [first, last) of whole sequences as int64."""
        assert first % length == 0
        return np.asarray(self.tokens[first:last], dtype=np.int64)

    def fingerprint(self) -> str:
        """Return the SHA-256 of tokens and document ends; equal text has an equal fingerprint."""
        digest = hashlib.sha256()
        for begin in range(0, len(self.tokens), _HASH_CHUNK):
            digest.update(np.asarray(self.tokens[begin : begin + _HASH_CHUNK], "<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self, vocab_size: int) -> np.ndarray:
        """Return the occurrences of every token, int64 [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for begin in range(0, len(self.tokens), _HASH_CHUNK):
            chunk = np.asarray(self.tokens[begin : begin + _HASH_CHUNK], dtype=np.int64)
            counts += np.bincount(chunk, minlength=vocab_size)
        return counts


def open_corpus(
    path: str,
    tokenizer: Callable[[], Any],
    *,
    documents: str | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """Open a Megatron dataset by its prefix, or text files by name or glob.

    Args:
        path: prefix of ``.bin`` and ``.idx``, or a text file, glob or directory of .txt/.md/.jsonl.
        tokenizer: returns the model's tokenizer; called for text files only.
        documents: a slice ``FIRST:LAST`` (``-4:`` are the last four); None takes all.
        max_tokens: how many tokens to keep from the start; None keeps all.

    Raises:
        DataError: nothing is there, it cannot be read, or no token is left.
    """
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    if Path(f"{prefix}.idx").exists():
        corpus = _open_megatron(prefix)
    else:
        corpus = _open_text(path, tokenizer())
    corpus = _select(corpus, documents, max_tokens)
    if not len(corpus.tokens):
        raise DataError(f"the corpus {path} is empty: it holds no token to record")
    return corpus


def check_tokenizer(corpus: Corpus, folder: Path, vocab_size: int) -> None:
    """Refuse a corpus that was tokenized for another model.

    Raises:
        DataError: the corpus has an id that the model lacks, or another tokenizer made it.
    """
    highest = max(
        int(corpus.tokens[begin : begin + _HASH_CHUNK].max())
        for begin in range(0, len(corpus.tokens), _HASH_CHUNK)
    )
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer does not fit: {corpus.path} holds token {highest}, but the model in "
            f"{folder} has tokens 0 to {vocab_size - 1}; use the tokenizer that it was trained with"
        )
    model = folder / "tokenizer.model"
    expected = corpus.tokenizer_sha256
    if expected and model.is_file() and sha256_of(model) != expected:
        raise DataError(
            f"the tokenizer does not fit: {corpus.path} was made with another tokenizer than "
            f"{model}; tokenize the text again with that one"
        )


def _open_megatron(prefix: str) -> Corpus:
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        found = read_index(index)
        dtype, lengths = found.dtype, found.lengths
        if dtype.kind not in "iu":
            raise DataError(f"{index} holds data of type {dtype}; token ids are integers")
        if not data.exists():
            raise DataError(f"{data} is missing next to {index}")
        total = int(lengths.sum())
        if data.stat().st_size < total * dtype.itemsize:
            raise DataError(f"{data} is shorter than {index} says; it is damaged or half copied")
        if total == 0:
            return Corpus(prefix, "megatron", np.zeros(0, np.int32), np.zeros(1, np.int64))
        tokens = np.memmap(
            data, dtype=dtype, mode="r", shape=(data.stat().st_size // dtype.itemsize,)
        )
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the dataset {prefix}: {error}") from error
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not np.array_equal(found.offsets, ends[:-1] * dtype.itemsize):
        raise DataError(f"the sequences of {index} do not follow one another in {data}")
    return Corpus(prefix, "megatron", tokens[:total], ends[found.documents], _made_with(prefix))


def _made_with(prefix: str) -> str | None:
    manifest = Path(f"{prefix}.manifest.json")
    if not manifest.exists():
        return None
    return read_object(manifest, DataError).get("tokenizer_sha256")


def _open_text(path: str, tokenizer: Any) -> Corpus:
    end = getattr(tokenizer, "eos_token_id", None)
    pieces: list[np.ndarray] = []
    for text in _texts(path):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            pieces.append(np.asarray([*ids, *([] if end is None else [end])], dtype=np.int32))
    starts = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Corpus(path, "text", tokens, starts)


def _texts(path: str) -> Iterator[str]:
    folder = Path(path)
    known = ("*.txt", "*.md", "*.jsonl")
    patterns = [str(folder / "**" / k) for k in known if any(folder.rglob(k))]
    if folder.is_dir() and not patterns:
        raise DataError(f"the corpus {path} is empty: the directory holds no {', '.join(known)}")
    yield from read_texts(patterns or [path])


def _select(corpus: Corpus, documents: str | None, max_tokens: int | None) -> Corpus:
    first, last = 0, len(corpus.starts) - 1
    if documents is not None:
        first, last = _range(documents, last)
    begin, end = int(corpus.starts[first]), int(corpus.starts[max(first, last)])
    if max_tokens is not None:
        if max_tokens < 1:
            raise DataError(f"--max-tokens must be at least 1, got {max_tokens}")
        end = min(end, begin + max_tokens)
    starts = corpus.starts[first : max(first, last) + 1] - begin
    starts = np.append(starts[starts < end - begin], end - begin)
    return Corpus(
        corpus.path, corpus.kind, corpus.tokens[begin:end], starts, corpus.tokenizer_sha256
    )


def _range(text: str, documents: int) -> tuple[int, int]:
    try:
        first, last = (int(part) if part else None for part in text.split(":"))
    except ValueError as error:
        raise DataError(
            f"--documents takes FIRST:LAST such as 0:10 or -4:, got {text!r}"
        ) from error
    begin, end, _ = slice(first, last).indices(documents)
    return begin, end


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return what each token adds to a text, spaces included; a byte piece stays ``<0x0A>``.

    A token that is decoded on its own may lose its leading space, so SentencePiece's mark for it
    is read from the pieces. Ids that the tokenizer does not know become ``<id>``.
    """
    known = min(vocab_size, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    special = set(tokenizer.all_special_ids)
    space = " " if _separates(tokenizer, pieces, special) else ""
    texts = []
    for number, piece in enumerate(pieces):
        if piece is None:
            texts.append(f"<{number}>")
        elif number in special or _BYTE.fullmatch(piece):
            texts.append(piece)
        else:
            texts.append(space + _token_text(tokenizer, number, piece))
    return [*texts, *(f"<{number}>" for number in range(known, vocab_size))]


def join_tokens(texts: Sequence[str]) -> str:
    """Join the texts of tokens: byte pieces are decoded, special tokens stay unchanged."""
    if not any(_BYTE.fullmatch(text) for text in texts):
        return "".join(texts)
    data = bytearray()
    for text in texts:
        found = _BYTE.fullmatch(text)
        data += bytes([int(found[1], 16)]) if found else text.encode()
    return data.decode(errors="replace")


def _token_text(tokenizer: Any, number: int, piece: str) -> str:
    if "▁" in piece:
        return piece.replace("▁", " ")
    decoded = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    return piece if "\ufffd" in decoded else decoded


def _separates(tokenizer: Any, pieces: list[str], special: set[int]) -> bool:
    """Return whether the tokenizer puts spaces between tokens, as a word-level one does."""
    if any("▁" in piece or "Ġ" in piece for piece in pieces if piece):
        return False
    pair = [n for n in range(len(pieces)) if n not in special][:2]
    if len(pair) < 2:
        return False
    one, two = (tokenizer.decode([n], clean_up_tokenization_spaces=False) for n in pair)
    both = tokenizer.decode(pair, clean_up_tokenization_spaces=False)
    return both == f"{one} {two}"
