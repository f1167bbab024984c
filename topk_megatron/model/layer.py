"""A transformer layer with its TopK: on its output, inside its MLP, or both.

On the residual stream, the TopK follows the MLP's residual add (paper, section 3):

``h_l = TopK(h_{l-1} + Attention(...) + MLP(...))``

There the hidden dimension is never split over ranks, not even under tensor, sequence or context
parallelism, so no communication is needed. `topk_megatron.model.mlp` has the MLP's TopK.
"""

import functools
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from topk_megatron.model.mlp import add_topk
from topk_megatron.model.runtime import TopKRuntime


class TopKLayerMixin:
    """Adds a TopK without parameters to any of Megatron's transformer layers.

    It hooks `_forward_post_mlp` (megatron/core/transformer/transformer_layer.py), the exit that
    dense and MoE layers and CUDA-graph replay share. The overlapped expert-parallel schedule
    bypasses it (fine_grained_callables.py), so that `check_settings` refuses that schedule.
    """

    def __init__(self, *args: Any, topk: TopKRuntime, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.topk = topk
        # Layers of multi-token prediction come after the decoder and stay dense.
        self.topk_layer = None if kwargs.get("is_mtp_layer") else global_layer_number(self)
        if self.topk_layer is not None:
            assert self.topk_layer in topk.config.layers, (self.topk_layer, topk.config.layers)
            topk.register(self.topk_layer)
            if topk.config.mlp_layers:
                add_topk(self.mlp, topk.config)  # pyright: ignore[reportAttributeAccessIssue]

    def _forward_post_mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output: [s, b, h], or [s / tp, b, h] under sequence parallelism."""
        hidden_states: Tensor = super()._forward_post_mlp(*args, **kwargs)  # pyright: ignore
        if self.topk_layer not in self.topk.config.residual_layers:
            return hidden_states
        training: bool = self.training  # pyright: ignore[reportAttributeAccessIssue]
        return self.topk.apply(hidden_states, self.topk_layer, training=training)


def global_layer_number(layer: Any) -> int:
    """Convert Megatron's global layer number, counted from 1, to ours, counted from 0."""
    return layer.layer_number - 1


@functools.cache
def with_topk(layer_class: type[TransformerLayer]) -> type[TransformerLayer]:
    """Return the TopK form of a transformer layer class (dense, MoE, or a user's own subclass)."""
    return type(f"TopK{layer_class.__name__}", (TopKLayerMixin, layer_class), {})


TopKTransformerLayer = with_topk(TransformerLayer)
