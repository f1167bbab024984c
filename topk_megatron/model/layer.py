"""A transformer layer with its TopK: on its output, inside its MLP, or both.

On the residual stream the layer's output is its k largest neurons:

``h_l = TopK(h_{l-1} + Attention(...) + MLP(...))``: the activation follows the MLP's residual add
(paper, section 3). The hidden dimension is never split over ranks at this point, also under tensor,
sequence and context parallelism, so that no communication is needed. The MLP's TopK is
`topk_megatron.model.mlp`.
"""

import functools
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from topk_megatron.model.mlp import add_topk
from topk_megatron.model.runtime import TopKRuntime


class TopKLayerMixin:
    """Adds the TopK to any of Megatron's transformer layers; has no parameters of its own.

    It hooks `_forward_post_mlp` (megatron/core/transformer/transformer_layer.py), through which
    dense and MoE layers, CUDA-graph replay and the overlapped expert-parallel schedule all leave.
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
        """Returns: [s, b, h], or [s / tp, b, h] under sequence parallelism."""
        hidden_states: Tensor = super()._forward_post_mlp(*args, **kwargs)  # pyright: ignore
        if self.topk_layer not in self.topk.config.residual_layers:
            return hidden_states
        training: bool = self.training  # pyright: ignore[reportAttributeAccessIssue]
        return self.topk.apply(hidden_states, self.topk_layer, training=training)


def global_layer_number(layer: Any) -> int:
    """Megatron's layer number, 1-based and global, as ours: counted from 0."""
    return layer.layer_number - 1


@functools.cache
def with_topk(layer_class: type[TransformerLayer]) -> type[TransformerLayer]:
    """The TopK form of a transformer layer class (dense, MoE, or a user's own subclass)."""
    return type(f"TopK{layer_class.__name__}", (TopKLayerMixin, layer_class), {})


TopKTransformerLayer = with_topk(TransformerLayer)
