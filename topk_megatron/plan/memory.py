"""Memory of a GPU in bytes: weights, gradients, optimizer, dense and sparse activations.

Formulas (bytes; s tokens of a sequence, b sequences of a microbatch, t TP, d DP, m microbatches, P
parameters of a rank, H, F, A, G, D as in `topk_megatron.plan.shape`):

    weights 2 P, gradients 4 P, optimizer 12 P / d: bfloat16 weights, float32 gradients, and float32
    master weights and Adam's moments over the d ranks of the distributed optimizer

    kept by a layer for each of its s b / t tokens (fused attention, bfloat16):
        8 H    inputs of both norms, of QKV and of the first MLP layer
        2 (A + 2 G) D + 2 A D    queries, keys and values; attention's output
        6 F with a gate, 4 F without    inputs of the activation and of the second MLP layer
        2 H    masks, only with dropout
        H / 8    the selection of a TopK
    under full recompute only its input, 2 H, and all of one layer while it is computed again

    sparse: an input that is a TopK output takes as much as its message (`parallel.wire`), the
    embedding's output as much as its token ids

    in flight on stage i of p: min(m, p - i) microbatches; output layer on the last stage: 6 V + 4 H
    per token and rank (logits in bfloat16 and float32, inputs of the final norm and of the layer)

Not counted are buffers of NCCL and kernels, fragmentation (`assumptions.USABLE_MEMORY`), token ids,
softmax statistics of fused attention and rotary tables.
"""

from dataclasses import dataclass

import torch

from topk_megatron.parallel.wire import WireFormat, wire_format
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes per parameter
_IDS = 16  # bytes of a token's id and position


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one rank of one pipeline stage, in bytes.

    Attributes:
        stage: The number of the stage.
        weights: Its weights.
        gradients: Its gradients.
        optimizer: Its share of the optimizer's state.
        dense: Its activations without sparse saving.
        sparse: Its activations with sparse saving.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    dense: float
    sparse: float

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer together."""
        return self.weights + self.gradients + self.optimizer

    def total(self, *, sparse_save: bool) -> float:
        """Return the sum, with dense or sparse activations."""
        return self.states + (self.sparse if sparse_save else self.dense)


def memory_of(shape: Shape, layout: Layout, stage: int) -> Memory:
    """Return the memory of a rank of pipeline stage `stage`."""
    parameters = shape.stage_parameters(layout.tp, layout.pp, stage)
    return Memory(
        stage=stage,
        weights=WEIGHT * parameters,
        gradients=GRADIENT * parameters,
        optimizer=OPTIMIZER * parameters / layout.dp,
        dense=activations(shape, layout, stage, sparse=False),
        sparse=activations(shape, layout, stage, sparse=True),
    )


def fullest(shape: Shape, layout: Layout) -> Memory:
    """Return the memory of the stage that needs most, with the layout's way of saving."""
    stages = (memory_of(shape, layout, stage) for stage in range(layout.pp))
    return max(stages, key=lambda memory: memory.total(sparse_save=layout.sparse_save))


def wire_of(shape: Shape, *, at_peak: bool = False) -> WireFormat | None:
    """Return the format in which a TopK output is sent and kept; None where dense is as good.

    Args:
        shape: The model.
        at_peak: Use the largest k of the annealing, which memory must hold, not the final k.
    """
    k = max(shape.topk.k, shape.topk.start_k) if at_peak else shape.topk.k
    return wire_format(shape.hidden, k, torch.bfloat16)


def layer_bytes(shape: Shape, layer: int) -> float:
    """Return the bytes per token that a layer keeps without recompute, over all its ranks."""
    kept = 8 * shape.hidden + 2 * (shape.qkv_width + shape.attention_width)
    kept += (6 if shape.gated else 4) * shape.ffn
    kept += 2 * shape.hidden if shape.dropout else 0
    return kept + (shape.hidden / 8 if layer in shape.topk.residual_layers else 0)


def input_bytes(shape: Shape, layout: Layout, layer: int, *, sparse: bool) -> float:
    """Return the bytes per token of a layer's input in the form in which it is kept.

    The received input of a stage's first layer stays dense unless it was sent sparsely. The
    embedding's output is looked up again unless there is dropout, so every rank keeps ids and
    positions.
    """
    wire = wire_of(shape, at_peak=True)
    if sparse and layer == 0 and shape.topk.residual_layers and not shape.dropout:
        return _IDS * layout.tp
    first_of_stage = layer % (shape.layers // layout.pp) == 0
    is_packed = layer - 1 in shape.topk.residual_layers
    if first_of_stage and not layout.sparse_p2p:
        is_packed = False
    if not sparse or not is_packed or wire is None:
        return 2 * shape.hidden
    return wire.values_bytes(1) + wire.selection_bytes


def activations(shape: Shape, layout: Layout, stage: int, *, sparse: bool) -> float:
    """Return the bytes of activations at the peak of a step, on one rank of a stage."""
    tokens = layout.tokens(shape)
    layers = shape.stage_layers(layout.pp, stage)
    whole = sum(layer_bytes(shape, layer) for layer in layers)
    inputs = sum(input_bytes(shape, layout, layer, sparse=sparse) for layer in layers)
    dense_inputs = 2 * shape.hidden * len(layers)
    kept = inputs if layout.recompute else whole - dense_inputs + inputs
    if stage == 0 and shape.dropout:
        kept += shape.hidden
    in_flight = min(layout.microbatches(shape), layout.pp - stage)
    working = max(layer_bytes(shape, layer) for layer in layers) if layout.recompute else 0
    logits = 6 * shape.padded(layout.tp) + 4 * shape.hidden if stage == layout.pp - 1 else 0
    return tokens * (kept * in_flight + max(working, logits))
