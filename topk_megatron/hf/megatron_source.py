"""Reads a Megatron checkpoint for conversion: configuration, TopK settings, weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.config import TopKConfig, exported_settings
from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.hf.flag_mapping import read_config
from topk_megatron.hf.mapping import EXTRA_STATE, NOT_THE_MODEL
from topk_megatron.hf.pieces import SPLITS, Piece, shapes

_LAYER = "decoder.layers."
_VOCABULARY = "embedding.word_embeddings.weight"


class MegatronSource:
    """One iteration of a checkpoint, checked against the mapping before a weight is read.

    Attributes:
        reader: the opened checkpoint.
        iteration: steps taken.
        tokens_seen: tokens trained on.
        topk: TopK settings; None for a stock checkpoint that is exported as dense.
        config: the exported configuration, without the tokenizer's tokens.
        padded_vocabulary: number of rows of the embedding in the checkpoint.
    """

    def __init__(
        self, reader: CheckpointReader, *, dense: bool = False, vocab_size: int | None = None
    ) -> None:
        """Check a checkpoint.

        Args:
            reader: the opened checkpoint.
            dense: whether the checkpoint is meant to have no TopK settings.
            vocab_size: size of the tokenizer, for checkpoints that do not record it.

        Raises:
            CheckpointError: the mapping does not know a flag, a TopK setting or a weight.
        """
        self.reader = reader
        args = reader.args
        self.iteration = int(reader.common["iteration"])
        self.tokens_seen = int(args.consumed_train_samples) * int(args.seq_length)
        self.topk = _read_topk(reader.directory, args, dense)
        section = exported_settings(self.topk, self.iteration)
        self.config = {**read_config(args), "topk": section}
        self.config["vocab_size"] = _vocab_size(args, vocab_size)
        self.padded_vocabulary = self._padded_vocabulary()
        self._shapes = shapes(self.config, self.padded_vocabulary)
        self._places = {piece: self._find(piece) for piece in self._shapes}
        self._check_shapes()
        self._refuse_unknown()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, taken from the embedding."""
        return self.reader.tensors[_VOCABULARY].properties.dtype

    def pieces(self) -> list[Piece]:
        """Return the pieces of the model in the order of the exported file."""
        return list(self._shapes)

    def stored_dtype(self, piece: Piece) -> torch.dtype:
        """Return the dtype that a piece has in the checkpoint."""
        return self.reader.tensors[self._places[piece][0]].properties.dtype

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Return the shape that a piece has in Megatron."""
        return self._shapes[piece]

    def read(self, piece: Piece) -> Tensor:
        """Read a piece as Megatron has it."""
        return self.reader.read(*self._places[piece])

    def read_parts(self, piece: Piece) -> tuple[Tensor, ...]:
        """Read a piece as Hugging Face has it: one tensor for each of its names."""
        return SPLITS[piece.row.split].cut(self.read(piece), self.config)

    def _padded_vocabulary(self) -> int:
        if _VOCABULARY not in self.reader.tensors:
            raise CheckpointError(
                f"{self.reader.directory} has no {_VOCABULARY}; it does not hold a GPT model"
            )
        rows = int(self.reader.tensors[_VOCABULARY].size[0])
        if rows < self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.reader.directory} embeds {rows} tokens, fewer than the "
                f"{self.config['vocab_size']} of its tokenizer"
            )
        return rows

    def _check_shapes(self) -> None:
        for piece, (key, lead) in self._places.items():
            expected = self._shapes[piece]
            found = tuple(self.reader.tensors[key].size[len(lead) :])
            if found != expected:
                raise CheckpointError(
                    f"{self.reader.directory}: {key} has shape {list(found)} where the "
                    f"checkpoint's own settings say {list(expected)}"
                )

    def _find(self, piece: Piece) -> tuple[str, tuple[int, ...]]:
        """Return the key and leading indices of a piece; layers may be stacked into one tensor."""
        expert = () if piece.expert is None else (piece.expert,)
        names = [name for name in (piece.row.megatron, piece.row.alias) if name is not None]
        for name in names:
            if piece.layer is None:
                candidates = [(name, ())]
            else:
                stacked = (f"{_LAYER}{name}", (piece.layer, *expert))
                candidates = [stacked, (f"{_LAYER}{piece.layer}.{name}", expert)]
            for key, lead in candidates:
                stored = self.reader.tensors.get(key)
                if stored is not None and all(
                    index < size for index, size in zip(lead, stored.size, strict=False)
                ):
                    return key, lead
        where = "" if piece.layer is None else f" of layer {piece.layer}"
        raise CheckpointError(
            f"{self.reader.directory} has no {names[0]}{where}, which its own settings ask for"
        )

    def _refuse_unknown(self) -> None:
        used: dict[str, set[tuple[int, ...]]] = {}
        for key, lead in self._places.values():
            used.setdefault(key, set()).add(lead)
        for key, stored in self.reader.tensors.items():
            if key.startswith(NOT_THE_MODEL):
                continue
            if key not in used:
                raise self._unknown(key)
            lead = len(next(iter(used[key])))
            if len(used[key]) != stored.size[:lead].numel():
                raise CheckpointError(
                    f"{self.reader.directory}: {key} holds {list(stored.size[:lead])} slices, of "
                    f"which its own settings account for {len(used[key])}"
                )
        for key in self.reader.others:
            known = key.startswith((*NOT_THE_MODEL, "common_state"))
            if not known and EXTRA_STATE not in key:
                raise self._unknown(key)

    def _unknown(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.reader.directory} holds {key}, which the mapping does not know for this "
            "model; exporting without it would give another model"
        )


def _read_topk(directory: Path, args: Any, dense: bool) -> TopKConfig | None:
    settings = getattr(args, "topk", None)
    if settings is None:
        if dense:
            return None
        raise CheckpointError(
            f"{directory} has no TopK settings; if it is a dense model of stock Megatron, say so "
            "with --dense"
        )
    try:
        config = TopKConfig.from_dict(settings)
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: its TopK settings are invalid: {error}") from error
    if dense and config.layers:
        raise CheckpointError(
            f"{directory} has a TopK at layers {list(config.layers)}; --dense would export another "
            "model, so drop the flag"
        )
    return config


def _vocab_size(args: Any, given: int | None) -> int:
    size = getattr(args, "tokenizer_vocab_size", None)
    if size is None:
        size = given
    if size is None:
        raise CheckpointError(
            "the checkpoint's arguments lack the size of its vocabulary without padding; "
            "give the tokenizer that it was trained with: --tokenizer-model"
        )
    return int(size)
