"""Exports tokenizers to Hugging Face, and checks that they return the ids of training."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError, DataError
from topk_megatron.files import write_json

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
# Texts on which both tokenizers must agree.
SAMPLES = (
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    "  two leading spaces,\ttabs\t\tand trailing ones   ",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 3.14159, 1_000_000\n\n\n",
    "naïve café, Straße, Ångström, ﬁ ligature, ½ — “quotes” … a\u00a0b",
    "日本語 русский العربية हिन्दी 한국어 🙂👩‍👩‍👧",
    "a\r\nb\x0cc\u200bd\ufeff",
    "x",
    " ",
    "\n",
)


def export_tokenizer(
    tokenizer_type: str, model: str, directory: Path, max_length: int
) -> dict[str, int | None]:
    """Write the tokenizer into `directory` and compare it with the one of training.

    Args:
        tokenizer_type: its type in Megatron.
        model: the file, directory or name from which it is opened.
        directory: the exported folder.
        max_length: the model's longest input, in tokens.

    Returns:
        ``vocab_size``, and the ids of bos, eos and pad (None where it has none).

    Raises:
        DataError: the tokenizer does not exist.
        CheckpointError: it has no counterpart, or the counterpart returns other ids.
    """
    if tokenizer_type == SENTENCEPIECE:
        return _export_sentencepiece(Path(model), directory, max_length)
    if tokenizer_type == HUGGING_FACE:
        return _export_hugging_face(model, directory)
    raise CheckpointError(
        f"{tokenizer_type} cannot be exported; the converter knows {SENTENCEPIECE} and "
        f"{HUGGING_FACE}. --no-tokenizer exports the weights alone"
    )


def tokenizer_size(model: str) -> int:
    """Return the number of tokens of a sentencepiece file or a Hugging Face tokenizer.

    Raises:
        DataError: the tokenizer cannot be opened.
    """
    if Path(model).is_file():
        return int(_open_sentencepiece(Path(model)).get_piece_size())
    try:
        return len(_open(model))
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer-model {model} cannot be opened") from error


def _open_sentencepiece(model: Path) -> Any:
    import sentencepiece

    pieces: Any = sentencepiece.SentencePieceProcessor()
    try:
        pieces.load(str(model))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{model} is not a sentencepiece model") from error
    return pieces


def _export_sentencepiece(model: Path, directory: Path, max_length: int) -> dict[str, int | None]:
    if not model.is_file():
        raise DataError(
            f"the tokenizer {model} of the training run does not exist; say where it is now with "
            "--tokenizer-model"
        )
    pieces = _open_sentencepiece(model)
    shutil.copyfile(model, directory / "tokenizer.model")
    ids = {name: getattr(pieces, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    if ids["pad"] < 0:
        ids["pad"] = ids["eos"]  # batches need one, and attention masks it
    tokens = {n: pieces.id_to_piece(i) for n, i in ids.items() if i >= 0}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": _adds_prefix(pieces),
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **{f"{name}_token": token for name, token in tokens.items()},
    }
    write_json(directory / "tokenizer_config.json", settings)
    _add_fast_file(directory)
    _compare(directory, lambda text: list(pieces.encode_as_ids(text)), str(model))
    return {
        "vocab_size": int(pieces.get_piece_size()),
        **{f"{n}_token_id": i if i >= 0 else None for n, i in ids.items() if n != "unk"},
    }


def _adds_prefix(pieces: Any) -> bool:
    """Whether the model adds a space in front of every text."""
    return pieces.encode("x", out_type=str) != ["x"]


def _add_fast_file(directory: Path) -> None:
    """Write ``tokenizer.json``, so that the folder opens where sentencepiece is not installed."""
    with tempfile.TemporaryDirectory() as other:
        _open(directory).save_pretrained(other)
        made = Path(other) / "tokenizer.json"
        if made.is_file():
            shutil.copyfile(made, directory / made.name)


def _export_hugging_face(model: str, directory: Path) -> dict[str, int | None]:
    try:
        original = _open(model)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tokenizer {model} of the training run cannot be opened; say where it is with "
            f"--tokenizer-model ({' '.join(str(error).split())[:120]})"
        ) from error
    original.save_pretrained(directory)
    _compare(
        directory, lambda t: original.encode(t, add_special_tokens=False, verbose=False), model
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(original), **{name: getattr(original, name) for name in names}}


def _compare(directory: Path, expected: Callable[[str], list[int]], model: str) -> None:
    exported = _open(directory)
    for text in SAMPLES:
        got = exported.encode(text, add_special_tokens=False, verbose=False)
        if got != expected(text):
            raise CheckpointError(
                f"the exported tokenizer would return other ids than {model}: for {text!r} it "
                f"returns {got[:12]}, training had {expected(text)[:12]}"
            )


def _open(path: Path | str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
