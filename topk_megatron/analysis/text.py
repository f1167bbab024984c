"""Tokens as text."""

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """What every token adds to a text, spaces included; a byte piece stays ``<0x0A>``.

    A token decoded on its own may lose its leading space, so sentencepiece's mark of it is read
    from the pieces. Ids that the tokenizer does not know are ``<id>``.
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
            texts.append(space + _text(tokenizer, number, piece))
    return [*texts, *(f"<{number}>" for number in range(known, vocab_size))]


def join_tokens(texts: Sequence[str]) -> str:
    """The text of several tokens, byte pieces decoded and special tokens as they are."""
    if not any(_BYTE.fullmatch(text) for text in texts):
        return "".join(texts)
    data = bytearray()
    for text in texts:
        found = _BYTE.fullmatch(text)
        data += bytes([int(found[1], 16)]) if found else text.encode()
    return data.decode(errors="replace")


def _text(tokenizer: Any, number: int, piece: str) -> str:
    if "▁" in piece:
        return piece.replace("▁", " ")
    decoded = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    return piece if "\ufffd" in decoded else decoded


def _separates(tokenizer: Any, pieces: list[str], special: set[int]) -> bool:
    """A word-level tokenizer puts spaces between tokens that are not part of any."""
    if any("▁" in piece or "Ġ" in piece for piece in pieces if piece):
        return False
    pair = [n for n in range(len(pieces)) if n not in special][:2]
    if len(pair) < 2:
        return False
    one, two = (tokenizer.decode([n], clean_up_tokenization_spaces=False) for n in pair)
    both = tokenizer.decode(pair, clean_up_tokenization_spaces=False)
    return both == f"{one} {two}"
