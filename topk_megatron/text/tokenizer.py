"""Trains sentencepiece tokenizers, and opens any tokenizer as Megatron's training does."""

import hashlib
import io
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from topk_megatron.errors import DataError
from topk_megatron.files import sha256_of
from topk_megatron.text.reading import BadLineError, document, expand, read_records

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
# Sentencepiece silently drops longer lines (its max_sentence_length).
_MAX_LINE_BYTES = 4000
# With identity normalisation and no dummy prefix, text survives encoding and decoding byte for
# byte, and Hugging Face's implementations return the same ids.
_SENTENCEPIECE_SETTINGS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "minloglevel": 2,
}


def train_sentencepiece(
    patterns: list[str],
    output: Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    json_key: str = "text",
    max_sentences: int = 5_000_000,
) -> int:
    """Train a tokenizer and write it to `output` in one step.

    Args:
        patterns: text files or globs.
        output: the ``.model`` file.
        vocab_size: number of pieces, including special tokens and 256 byte pieces.
        model_type: ``bpe`` or ``unigram``.
        character_coverage: share of characters that get their own pieces; others become bytes.
        json_key: key of the text in JSON lines.
        max_sentences: number of lines to sample from a larger corpus.

    Returns:
        The number of lines read.

    Raises:
        DataError: there is no text, a line is bad, or the text cannot fill the vocabulary.
    """
    import sentencepiece

    _check_training(vocab_size, character_coverage, max_sentences)
    temporary = _open_partial(output)
    lines = _CountingLines(_lines(patterns, json_key))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=True,
            **_SENTENCEPIECE_SETTINGS,
        )
    except (RuntimeError, OSError) as error:
        temporary.unlink(missing_ok=True)
        if lines.error is not None:
            raise lines.error from error
        if not lines.count:
            raise DataError("there is no text in the input files") from error
        raise DataError(f"cannot train the tokenizer: {_last_sentence(error)}") from error
    temporary.write_bytes(model.getvalue())
    temporary.replace(output)
    return lines.count


class _CountingLines:
    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.count = 0
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for line in self._lines:
                self.count += 1
                yield from _pieces(line)
        except DataError as error:
            self.error = error  # sentencepiece wraps it in an error of its own
            raise


def _pieces(line: str) -> Iterator[str]:
    """Cut a line that sentencepiece would silently drop for its length."""
    while len(line.encode()) > _MAX_LINE_BYTES:
        # A character has at most four bytes.
        cut = line.rfind(" ", 1, _MAX_LINE_BYTES // 4)
        cut = cut if cut > 0 else _MAX_LINE_BYTES // 4
        yield line[:cut]
        line = line[cut:]
    yield line


def _check_training(vocab_size: int, character_coverage: float, max_sentences: int) -> None:
    if vocab_size < 300:
        raise DataError(
            f"--vocab-size must be at least 300 (256 bytes and special pieces), got {vocab_size}"
        )
    if not 0.9 <= character_coverage <= 1:
        raise DataError(f"--character-coverage must be in [0.9, 1], got {character_coverage}")
    if max_sentences < 100:
        raise DataError(f"--max-sentences must be at least 100, got {max_sentences}")


def _open_partial(output: Path) -> Path:
    """Fail on a path that cannot be written before the training and not after it."""
    if not output.name or output.is_dir():
        raise DataError(f"--output must name a file, got {str(output)!r}")
    temporary = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise DataError(f"cannot write {output}: {error}") from error
    return temporary


def _lines(patterns: list[str], json_key: str) -> Iterator[str]:
    for path in expand(patterns):
        for record in read_records(path):
            try:
                text = document(record, json_key)
            except BadLineError as error:
                raise DataError(f"{record.path}:{record.line}: {error}") from error
            yield from (line for line in text.splitlines() if line)


def _last_sentence(error: Exception) -> str:
    """Return sentencepiece's message without the source location in front of it."""
    return str(error).rsplit("] ", maxsplit=1)[-1].strip() or str(error)


def add_tokenizer_arguments(parser: ArgumentParser) -> None:
    """Add the flags that name a tokenizer, spelled as in Megatron."""
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        help="a sentencepiece .model file, or a directory (or name) of a Hugging Face tokenizer",
    )


def open_tokenizer(tokenizer_type: str, tokenizer_model: str) -> Any:
    """Open a tokenizer through Megatron, so that it returns the ids of training.

    Returns:
        Megatron's tokenizer, with ``tokenize``, ``detokenize``, ``vocab_size`` and ``eod``.

    Raises:
        DataError: the file is missing, or is not a tokenizer of this type.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    check_tokenizer_path(tokenizer_type, tokenizer_model)
    try:
        return build_tokenizer(_megatron_settings(tokenizer_type, tokenizer_model))
    except Exception as error:  # each tokenizer library raises errors of its own
        raise DataError(
            f"{tokenizer_model} cannot be opened as a {tokenizer_type}: {error}"
        ) from error


def check_tokenizer_path(tokenizer_type: str, tokenizer_model: str) -> None:
    """Refuse a tokenizer file that does not exist.

    A Hugging Face tokenizer may be a name that its library looks up.

    Raises:
        DataError: there is no such file.
    """
    if tokenizer_type != "HuggingFaceTokenizer" and not Path(tokenizer_model).exists():
        raise DataError(
            f"--tokenizer-model {tokenizer_model} does not exist; "
            "make one with tools/train_tokenizer.py"
        )


def fingerprint(tokenizer_model: str) -> str:
    """Return the SHA-256 of a tokenizer's files, which tells if data and model belong together."""
    path = Path(tokenizer_model)
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file():
                digest.update(file.read_bytes())
    else:
        digest.update(tokenizer_model.encode())  # the name of a Hugging Face tokenizer
    return digest.hexdigest()


def _megatron_settings(tokenizer_type: str, tokenizer_model: str) -> Namespace:
    """Return the arguments that Megatron's `build_tokenizer` reads, with Megatron's defaults."""
    return Namespace(
        rank=0,
        tokenizer_type=tokenizer_type,
        tokenizer_model=tokenizer_model,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        chat_template=None,
        trust_remote_code=False,
        metadata_path=None,
        pad_vocab_size=False,
        tokenizer_hf_no_use_fast=False,
        # We append the end-of-document token ourselves, and add nothing else.
        tokenizer_hf_no_include_special_tokens=True,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
    )
