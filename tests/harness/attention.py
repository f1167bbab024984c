"""Megatron's core attention beside ours: the same settings, inputs and gradients for both."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from topk_megatron.compat import prepare_device


def prepare_megatron() -> None:
    """Prepare what Megatron's class asks of a training run: device, buffer and RNG tracker."""
    prepare_device()
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    seed(0)


def seed(number: int) -> None:
    """Seed the default generator and the one for differing tensor-parallel ranks."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker

    initialize_rng_tracker(force_reset=True)
    tracker: Any = get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", number + 1000)
    torch.manual_seed(number)


def both(
    heads: int = 4,
    groups: int = 4,
    size: int = 8,
    layer: int = 1,
    kind: str = "causal",
    **more: Any,
) -> tuple[Any, Any]:
    """Build Megatron's attention and ours with the same settings."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from topk_megatron.model.attention import FusedAttention

    scale, sequence_parallel = more.pop("softmax_scale", None), more.pop("sequence_parallel", False)
    config = TransformerConfig(
        **{
            "num_layers": 4,
            "hidden_size": heads * size,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "attention_dropout": 0.0,
            **more,
        }
    )
    config.sequence_parallel = sequence_parallel  # refused above without tensor parallelism
    tensor_parallel: Any = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    theirs, ours = (
        made(
            config=config,
            layer_number=layer,
            attn_mask_type=AttnMaskType[kind],
            attention_type="self",
            softmax_scale=scale,
            pg_collection=tensor_parallel,
        ).train()
        for made in (DotProductAttention, FusedAttention)
    )
    return theirs, ours


def qkv(
    length: int,
    batch: int = 2,
    heads: int = 4,
    groups: int = 4,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Make queries, keys and values with Megatron's strides, [S, B, heads, D]."""
    torch.manual_seed(length)
    widths = [heads // groups * size, size, size]
    mixed = torch.randn(length, batch, groups, sum(widths), dtype=dtype)
    query, key, value = mixed.split(widths, dim=3)
    parts = [query.reshape(length, batch, heads, size), key, value]
    return [part.detach().requires_grad_() for part in parts]


def result(call: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of a function that is not symmetric in the output."""
    output = call()
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, weights.to(output))]


def causal(length: int) -> Tensor:
    """Return the mask of a causal layer as Megatron makes it, [1, 1, S, S]: True where hidden."""
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
