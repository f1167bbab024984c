"""Training batches from JSON lines: texts for pretraining, or prompts with completions.

The data of a step depend only on the seed and the step. Neither a restart nor another number of
ranks changes them.
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
        tokens: Token IDs, as 32-bit integers.
        context: Number of tokens at the start that are read but not learned (the prompt).
    """

    tokens: "array[int]"
    context: int = 0

    @property
    def num_targets(self) -> int:
        """Number of tokens in the loss; nothing predicts the first token."""
        return len(self.tokens) - max(self.context, 1)


@dataclass(frozen=True)
class Microbatch:
    """Sequences padded on the right, as int64 tensors of shape [b, s].

    Attributes:
        tokens: Token IDs.
        mask: Attention mask; 0 at padding.
        targets: The token that follows each position; -100 where there is none to learn.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


def read_sequences(
    patterns: Sequence[str], encode: Encode, end: int, length: int
) -> tuple[list[Example], str]:
    """Read files of one kind; the keys of the first line decide which.

    Args:
        patterns: .jsonl files or globs, compressed or not.
        encode: Turns text into token IDs.
        end: The token that ends a document.
        length: Largest number of tokens in a sequence.

    Returns:
        The sequences, and a phrase that counts them.

    Raises:
        DataError: A line is not of this kind (the error has its number), or there is nothing to
            train on.
    """
    records = [record for path in expand(patterns) for record in read_records(path)]
    if not records:
        raise DataError(f"{', '.join(patterns)}: expected one JSON object per line, found no lines")
    if _keys(records[0]) >= {"text"}:
        return _pack(records, encode, end, length)
    if _keys(records[0]) >= {"prompt", "completion"}:
        return _pair(records, encode, end, length)
    found = ", ".join(sorted(_keys(records[0]))) or "none"
    raise DataError(
        f'{_place(records[0])}: expected the key "text", or "prompt" and "completion"; '
        f"found {found}"
    )


class Batches:
    """Sequences in the order of training: each epoch shuffles all of them."""

    def __init__(self, sequences: list[Example], batch_size: int, seed: int, pad: int) -> None:
        """Keep the sequences and the settings of their order.

        Args:
            sequences: All sequences to train on.
            batch_size: Sequences per step over all ranks.
            seed: Seed of the order.
            pad: The token that pads short sequences.
        """
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self.pad = pad
        self._order = functools.lru_cache(2)(self._shuffled)

    def step(self, number: int) -> list[Example]:
        """Return the sequences of a step, counted from 0."""
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [divmod(position, len(self.sequences)) for position in positions]
        return [self.sequences[self._order(epoch)[place]] for epoch, place in places]

    def collate(self, sequences: list[Example]) -> Microbatch:
        """Pad the sequences to the longest of them."""
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
    """Return the cross entropy in nats, summed over the targets of one microbatch."""
    batch, device = batches.collate(sequences), model.device
    logits = model(batch.tokens.to(device), batch.mask.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.to(device).flatten(), reduction="sum"
    )


def _pack(
    records: list[Record], encode: Encode, end: int, length: int
) -> tuple[list[Example], str]:
    """Join the documents and cut them into sequences of one length; drop the rest."""
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
    """Make one sequence per prompt and completion; leave out those longer than `length`."""
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
    """Return the keys of a line, which must be a JSON object."""
    if record.line == 0:
        raise DataError(f"{record.path}: expected a .jsonl file, with one JSON object per line")
    try:
        entry = json.loads(record.data)
    except ValueError as error:
        raise DataError(f"{_place(record)}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{_place(record)}: expected a JSON object, found {type(entry).__name__}")
    return set(entry)


def _place(record: Record) -> str:
    return f"{Path(record.path)}, line {record.line}"
