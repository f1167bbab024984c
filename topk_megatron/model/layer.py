"""A transformer layer with its TopK: on its output, inside its MLP, or both.

On the residual stream, the TopK follows the MLP's residual add (paper, section 3):

``h_l = TopK(h_{l-1} + Attention(...) + MLP(...))``

There the hidden dimension is never split over ranks, not even under tensor, sequence or context
parallelism, so no communication is needed. `topk_megatron.model.mlp` has the MLP's TopK.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from topk_megatron.model.mlp import add_topk
from topk_megatron.model.runtime import TopKRuntime

Add = Callable[..., Tensor]


class TopKLayerMixin:
    """Adds a TopK without parameters to any of Megatron's transformer layers."""

    def __init__(self, *args: Any, topk: TopKRuntime, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.topk = topk
        # Layers of multi-token prediction come after the decoder and stay dense.
        self.topk_layer = None if kwargs.get("is_mtp_layer") else global_layer_number(self)
        if self.topk_layer is not None:
            assert self.topk_layer in topk.config.layers, (self.topk_layer, topk.config.layers)
            topk.register(self.topk_layer)
            if self.topk_layer in topk.config.residual_layers:
                TopKAfterAdd(topk, self.topk_layer).attach(self)
            if topk.config.mlp_layers:
                mlp: Any = self.mlp  # pyright: ignore[reportAttributeAccessIssue]
                add_topk(mlp, topk.config, functools.partial(topk.count, "MLP", self.topk_layer))


class TopKAfterAdd:
    """The MLP's residual add of one layer, followed by the layer's TopK.

    Each path that Megatron has through a layer ends in the layer's `mlp_bda`: the layer's own
    forward (`_forward_post_mlp` in megatron/core/transformer/transformer_layer.py), the replay of a
    partial CUDA graph, and the overlapped expert-parallel schedule
    (megatron/core/models/gpt/fine_grained_callables.py). Only the fused communication of Megatron's
    inference engine leaves it out, which `check_settings` refuses.

    Megatron enables gradients around the add even where its caller disabled them, as the first pass
    of a recomputed layer does. The TopK does not: it would save its bitmask for nothing, and the
    statistics could not tell that pass from the second one.
    """

    def __init__(self, topk: TopKRuntime, layer: int) -> None:
        self._topk, self._layer = topk, layer
        self._callers_mode: bool | None = None

    def attach(self, layer: Any) -> None:
        """Make the TopK follow `layer.mlp_bda`, which builds the add for each call."""
        layer.bias_dropout_add_exec_handler = self._enable_grad
        build = layer.mlp_bda
        if isinstance(build, nn.Module):
            build.register_forward_hook(self._after_build)
        else:
            layer.mlp_bda = functools.partial(self._build, build)

    @contextlib.contextmanager
    def _enable_grad(self) -> Iterator[None]:
        """Do what Megatron's handler of the add does, and remember the mode of its caller."""
        self._callers_mode = torch.is_grad_enabled()
        try:
            with torch.enable_grad():
                yield
        finally:
            self._callers_mode = None

    def _build(self, build: Callable[[bool, bool], Add], training: bool, fused: bool) -> Add:
        return functools.partial(self._add_and_select, build(training, fused), training)

    def _after_build(self, _: nn.Module, args: tuple[bool, bool], add: Add) -> Add:
        return functools.partial(self._add_and_select, add, args[0])

    def _add_and_select(self, add: Add, training: bool, *args: Any) -> Tensor:
        """Return the layer's output: [s, b, h], or [s / tp, b, h] under sequence parallelism."""
        hidden_states = add(*args)
        mode = torch.is_grad_enabled() if self._callers_mode is None else self._callers_mode
        with torch.set_grad_enabled(mode):
            return self._topk.apply(hidden_states, self._layer, training=training)


def global_layer_number(layer: Any) -> int:
    """Convert Megatron's global layer number, counted from 1, to ours, counted from 0."""
    return layer.layer_number - 1


@functools.cache
def with_topk(layer_class: type[TransformerLayer]) -> type[TransformerLayer]:
    """Return the TopK form of a transformer layer class (dense, MoE, or a user's own subclass)."""
    return type(f"TopK{layer_class.__name__}", (TopKLayerMixin, layer_class), {})


TopKTransformerLayer = with_topk(TransformerLayer)
