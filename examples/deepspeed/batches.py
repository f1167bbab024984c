"""Training batches from JSON lines: texts to go on pretraining with, or prompts with completions.

What a step sees is a function of the seed and the step alone, so that neither a restart nor another
number of ranks changes it.
"""

import functools
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.errors import DataError
from topk_megatron.text.reading import BadLineError, Record, document, expand, read_records

Encode = Callable[[str], list[int]]
NO_TARGET = -100


@dataclass(frozen=True)
class Example:
    """One sequence of tokens to train on.

    Attributes:
        tokens: their numbers, in 32 bits.
        context: how many tokens at its start are read and not learned (a prompt).
    """

    tokens: "array[int]"
    context: int = 0

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is taken over; nothing predicts the first one."""
        return len(self.tokens) - max(self.context, 1)


@dataclass(frozen=True)
class Microbatch:
    """Sequences padded on the right: int64 tokens, attention mask and targets, each [b, s].

    A target is the token that follows; -100 where there is none to learn.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


def read_sequences(
    patterns: Sequence[str], encode: Encode, end: int, length: int
) -> tuple[list[Example], str]:
    """Read files of one kind, told by the keys of the first line.

    Args:
        patterns: .jsonl files or globs, perhaps compressed.
        encode: text to token numbers.
        end: the token that ends a document.
        length: tokens of the longest sequence.

    Returns:
        The sequences, and a sentence about them.

    Raises:
        DataError: a line that is not of this kind (with its number), or nothing to train on.
    """
    records = [record for path in expand(patterns) for record in read_records(path)]
    if not records:
        raise DataError(f"{', '.join(patterns)}: no lines; each must be a JSON object")
    if _keys(records[0]) >= {"text"}:
        return _pack(records, encode, end, length)
    if _keys(records[0]) >= {"prompt", "completion"}:
        return _pair(records, encode, end, length)
    found = ", ".join(sorted(_keys(records[0]))) or "none"
    raise DataError(
        f'{_place(records[0])}: expected the key "text", or "prompt" and "completion"; has {found}'
    )


class Batches:
    """Sequences in the order of training: each epoch is all of them, shuffled."""

    def __init__(self, sequences: list[Example], batch_size: int, seed: int, pad: int) -> None:
        """Args: batch_size: sequences of a step over all ranks. pad: token that fills up."""
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self.pad = pad
        self._order = functools.lru_cache(2)(self._shuffled)

    def step(self, number: int) -> list[Example]:
        """The sequences of a step, counted from 0."""
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [divmod(position, len(self.sequences)) for position in positions]
        return [self.sequences[self._order(epoch)[place]] for epoch, place in places]

    def collate(self, sequences: list[Example]) -> Microbatch:
        """Pad to the longest of them."""
        shape = (len(sequences), max(len(sequence.tokens) for sequence in sequences))
        tokens, targets = torch.full(shape, self.pad), torch.full(shape, NO_TARGET)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            values = torch.tensor(sequence.tokens.tolist())
            first = max(sequence.context, 1)
            tokens[row, : len(values)] = values
            mask[row, : len(values)] = 1
            targets[row, first - 1 : len(values) - 1] = values[first:]
        return Microbatch(tokens, mask, targets)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.sequences), generator=generator).tolist()


def summed_loss(model: Any, batches: Batches, sequences: list[Example]) -> torch.Tensor:
    """Cross entropy in nats, summed over the targets of one microbatch."""
    batch, device = batches.collate(sequences), model.device
    logits = model(batch.tokens.to(device), batch.mask.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.to(device).flatten(), reduction="sum"
    )


def _pack(
    records: list[Record], encode: Encode, end: int, length: int
) -> tuple[list[Example], str]:
    """Documents one after the other, cut into sequences of one length; the rest is dropped."""
    stream = array("i")
    for record in records:
        stream.extend([*encode(_text(record, "text")), end])
    starts = range(0, len(stream) - length + 1, length)
    if not starts:
        raise DataError(
            f"{len(records)} documents have {len(stream)} tokens, fewer than one sequence of "
            f"{length}; give more text or a smaller --seq-length"
        )
    sequences = [Example(stream[start : start + length]) for start in starts]
    said = f"{len(records)} documents, {len(stream)} tokens, {len(sequences)} sequences of {length}"
    return sequences, said


def _pair(
    records: list[Record], encode: Encode, end: int, length: int
) -> tuple[list[Example], str]:
    """A prompt and its completion a sequence; what is longer than `length` is left out."""
    sequences = []
    for record in records:
        prompt = encode(_text(record, "prompt"))
        tokens = [*prompt, *encode(_text(record, "completion")), end]
        sequences.append(Example(array("i", tokens), len(prompt)))
    fitting = [s for s in sequences if len(s.tokens) <= length and s.num_targets]
    if not fitting:
        raise DataError(
            f"none of {len(records)} examples has at most {length} tokens; give shorter ones or a "
            "larger --seq-length"
        )
    targets = sum(sequence.num_targets for sequence in fitting)
    said = f"{len(fitting)} examples, {targets} tokens to learn"
    if left_out := len(sequences) - len(fitting):
        said += f"; {left_out} longer than {length} tokens left out"
    return fitting, said


def _text(record: Record, key: str) -> str:
    try:
        return document(record, key)
    except BadLineError as error:
        raise DataError(f"{_place(record)}: {error}") from error


def _keys(record: Record) -> set[str]:
    """Keys of a line; complains if it is no JSON object."""
    if record.line == 0:
        raise DataError(f"{record.path}: expected a .jsonl file, with a JSON object a line")
    try:
        entry = json.loads(record.data)
    except ValueError as error:
        raise DataError(f"{_place(record)}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{_place(record)}: expected a JSON object, found {type(entry).__name__}")
    return set(entry)


def _place(record: Record) -> str:
    return f"{Path(record.path)}, line {record.line}"
