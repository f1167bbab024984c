"""How one Megatron tensor becomes several Hugging Face tensors, and back; bitwise inverses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Two inverse functions.

    Attributes:
        cut: Megatron tensor and configuration to the Hugging Face tensors.
        join: the inverse; of a vocabulary without its padding.
        shapes: shapes of what `cut` gives, from the Megatron shape.
    """

    cut: Callable[[Tensor, Config], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], Config], Tensor]
    shapes: Callable[[tuple[int, ...], Config], tuple[tuple[int, ...], ...]]


def _qkv_rows(config: Config) -> tuple[int, int, int]:
    """Rows of q, k and v in one key-value group."""
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
