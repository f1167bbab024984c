"""The mapping applied to one model: which tensors it has, their sizes, and how they are cut.

A piece is a row of `topk_megatron.hf.mapping.TOPK_LM` at one layer and expert. A split turns one
Megatron tensor into the Hugging Face tensors of its row and back; both ways are bitwise inverses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topk_megatron.hf.mapping import CONDITIONS, TOPK_LM, Row

Config = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A row at one place of a model.

    Attributes:
        row: the row of the table.
        layer: number of the layer, from 0; None outside the layers.
        expert: number of the expert, from 0; None outside experts.
    """

    row: Row
    layer: int | None = None
    expert: int | None = None

    @property
    def huggingface(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors at this place."""
        return tuple(n.format(layer=self.layer, expert=self.expert) for n in self.row.huggingface)


def pieces(config: Config) -> Iterator[Piece]:
    """Yield every piece of the model that `config` describes, in the order of the exported file."""
    for row in TOPK_LM[:1]:
        yield Piece(row)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer_pieces(config, layer)
    for row in TOPK_LM[1:]:
        if row.where == "model" and CONDITIONS[row.when](config):
            yield Piece(row)


def _layer_pieces(config: Config, layer: int) -> Iterator[Piece]:
    kind = "moe layer" if layer in config["moe_layers"] else "dense layer"
    for row in TOPK_LM:
        if row.where in ("layer", kind) and CONDITIONS[row.when](config):
            yield Piece(row, layer)
    if kind == "moe layer":
        for expert in range(config["num_experts"]):
            for row in TOPK_LM:
                if row.where == "expert" and CONDITIONS[row.when](config):
                    yield Piece(row, layer, expert)


def sizes(config: Config, padded_vocabulary: int) -> dict[str, int]:
    """Return numbers for the words in `Row.shape`."""
    head, groups = config["head_dim"], config["num_key_value_heads"]
    ffn, expert = config["intermediate_size"], config["moe_intermediate_size"] or 0
    shared = config["shared_expert_intermediate_size"]
    return {
        "vocabulary": padded_vocabulary,
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"] * head,
        "head": head,
        "qkv": (config["num_attention_heads"] + 2 * groups) * head,
        "ffn": ffn,
        "2 ffn": 2 * ffn,
        "experts": config["num_experts"],
        "expert ffn": expert,
        "2 expert ffn": 2 * expert,
        "shared ffn": shared,
        "2 shared ffn": 2 * shared,
    }


def shapes(config: Config, padded_vocabulary: int) -> dict[Piece, tuple[int, ...]]:
    """Return every piece in the order of the exported file, with its shape in Megatron."""
    numbers = sizes(config, padded_vocabulary)
    return {piece: tuple(numbers[word] for word in piece.row.shape) for piece in pieces(config)}


@dataclass(frozen=True)
class Split:
    """Two inverse functions and the shapes that they produce.

    Attributes:
        cut: takes a Megatron tensor and the configuration, returns the Hugging Face tensors.
        join: the inverse of `cut`; a vocabulary comes back without its padding.
        shapes: takes the Megatron shape, returns the shapes of what `cut` returns.
    """

    cut: Callable[[Tensor, Config], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], Config], Tensor]
    shapes: Callable[[tuple[int, ...], Config], tuple[tuple[int, ...], ...]]


def _qkv_rows(config: Config) -> tuple[int, int, int]:
    """Return the number of rows of q, k and v in one key-value group."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["head_dim"]
    return heads // groups * head, head, head


def _cut_qkv(qkv: Tensor, config: Config) -> tuple[Tensor, ...]:
    rest = qkv.shape[1:]
    grouped = qkv.view(config["num_key_value_heads"], -1, *rest)
    return tuple(part.reshape(-1, *rest) for part in grouped.split(_qkv_rows(config), dim=1))


def _join_qkv(parts: Sequence[Tensor], config: Config) -> Tensor:
    rest = parts[0].shape[1:]
    groups = config["num_key_value_heads"]
    grouped = torch.cat([part.view(groups, -1, *rest) for part in parts], dim=1)
    return grouped.reshape(-1, *rest)


def _shapes_qkv(shape: tuple[int, ...], config: Config) -> tuple[tuple[int, ...], ...]:
    groups = config["num_key_value_heads"]
    return tuple((groups * rows, *shape[1:]) for rows in _qkv_rows(config))


SPLITS: dict[str, Split] = {
    "copy": Split(
        cut=lambda tensor, config: (tensor,),
        join=lambda parts, config: parts[0],
        shapes=lambda shape, config: (shape,),
    ),
    "qkv": Split(_cut_qkv, _join_qkv, _shapes_qkv),
    # silu(first half) * second half, in Megatron as in Llama's gate and up.
    "gate and up": Split(
        cut=lambda tensor, config: tuple(tensor.chunk(2)),
        join=lambda parts, config: torch.cat(list(parts)),
        shapes=lambda shape, config: ((shape[0] // 2, *shape[1:]),) * 2,
    ),
    # Rows beyond the tokenizer's are padding for tensor parallelism.
    "vocabulary": Split(
        cut=lambda tensor, config: (tensor[: config["vocab_size"]],),
        join=lambda parts, config: parts[0],
        shapes=lambda shape, config: ((config["vocab_size"], *shape[1:]),),
    ),
}
