"""Tokenizers: train a sentencepiece model; open any tokenizer the way Megatron's training does."""

import hashlib
import io
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from topk_megatron.errors import DataError
from topk_megatron.text.sources import BadLineError, document, expand, read_records

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
# Identity normalisation and no dummy prefix: text survives encoding and decoding byte for byte, and
# Hugging Face's implementations give the same ids.
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
    """Train a tokenizer and write it to `output` in one step, so that no half-written model stays.

    Args:
        patterns: text files or globs.
        output: the ``.model`` file.
        vocab_size: pieces, special tokens and 256 byte pieces included.
        model_type: ``bpe`` or ``unigram``.
        character_coverage: share of characters that get pieces of their own; others become bytes.
        json_key: key of the text in JSON lines.
        max_sentences: lines sampled at random from a larger corpus.

    Returns:
        The number of lines read.

    Raises:
        DataError: no text, a bad line, or a vocabulary that the text cannot fill.
    """
    import sentencepiece

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
        if not lines.count:
            raise DataError("there is no text in the input files") from error
        raise DataError(f"cannot train the tokenizer: {_last_sentence(error)}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    temporary.write_bytes(model.getvalue())
    temporary.replace(output)
    return lines.count


class _CountingLines:
    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.count += 1
            yield line


def _lines(patterns: list[str], json_key: str) -> Iterator[str]:
    for path in expand(patterns):
        for record in read_records(path):
            try:
                text = document(record, json_key)
            except BadLineError as error:
                raise DataError(f"{record.path}:{record.line}: {error}") from error
            yield from (line for line in text.splitlines() if line)


def _last_sentence(error: Exception) -> str:
    """Sentencepiece's message without the source location in front of it."""
    return str(error).rsplit("] ", maxsplit=1)[-1].strip() or str(error)


def add_tokenizer_arguments(parser: ArgumentParser) -> None:
    """The flags that name a tokenizer, spelled as in Megatron."""
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        help="a sentencepiece .model file, or a directory (or name) of a Hugging Face tokenizer",
    )


def open_tokenizer(tokenizer_type: str, tokenizer_model: str) -> Any:
    """Open a tokenizer through Megatron, so that its ids are those of training.

    Returns:
        Megatron's tokenizer: ``tokenize``, ``detokenize``, ``vocab_size``, ``eod``.

    Raises:
        DataError: the file is missing or is no tokenizer of this type.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if not Path(tokenizer_model).exists():
        raise DataError(f"--tokenizer-model {tokenizer_model} does not exist")
    try:
        return build_tokenizer(_megatron_settings(tokenizer_type, tokenizer_model))
    except Exception as error:  # each tokenizer library raises errors of its own
        raise DataError(
            f"{tokenizer_model} cannot be opened as a {tokenizer_type}: {error}"
        ) from error


def fingerprint(tokenizer_model: str) -> str:
    """SHA-256 of a tokenizer's files, to tell whether data and model belong together."""
    digest = hashlib.sha256()
    path = Path(tokenizer_model)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    files = [path / name for name in names] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _megatron_settings(tokenizer_type: str, tokenizer_model: str) -> Namespace:
    """What Megatron's `build_tokenizer` reads of its arguments, with Megatron's defaults."""
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
        # Documents get their end-of-document token from us and nothing else.
        tokenizer_hf_no_include_special_tokens=True,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
    )
