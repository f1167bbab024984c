"""Tokens as text."""

from typing import Any

import numpy as np


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """What every token adds to a text, spaces included; a byte piece stays ``<0x0A>``.

    A token decoded on its own may lose its leading space, so sentencepiece's and byte-level BPE's
    marks of it are read from the pieces. Ids that the tokenizer does not know are ``<id>``.
    """
    known = min(vocab_size, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    texts = [_text(tokenizer, number, piece) for number, piece in enumerate(pieces)]
    return [*texts, *(f"<{number}>" for number in range(known, vocab_size))]


def _text(tokenizer: Any, number: int, piece: str | None) -> str:
    if piece is None:
        return f"<{number}>"
    if number in tokenizer.all_special_ids or (piece.startswith("<0x") and piece.endswith(">")):
        return piece
    if "▁" in piece:
        return piece.replace("▁", " ")
    decoded = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    return piece if "\ufffd" in decoded else decoded


def decode_windows(tokenizer: Any, windows: list[np.ndarray]) -> list[str]:
    """The texts of several windows of token ids."""
    lists = [window.tolist() for window in windows]
    return tokenizer.batch_decode(
        lists, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
