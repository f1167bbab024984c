"""Bytes of a GPU's memory: weights, gradients, optimizer, activations dense and sparse.

Formulas (bytes; s tokens of a sequence, b sequences of a microbatch, t TP, d DP, m microbatches, P
parameters of a rank, H, F, A, G, D as in `topk_megatron.plan.shape`):

    weights 2 P, gradients 4 P, optimizer 12 P / d: bfloat16 weights, float32 gradients, and float32
    master weights and Adam's moments over the d ranks of the distributed optimizer

    kept of a layer, for each of its s b / t tokens (fused attention, bfloat16):
        8 H    inputs of both norms, of QKV and of the first MLP layer
        2 (A + 2 G) D + 2 A D    queries, keys and values; attention's output
        6 F with a gate, 4 F without    inputs of the activation and of the second MLP layer
        2 H    masks, only with dropout
        H / 8    the selection of a TopK
    under full recompute its input alone, 2 H, and one layer's whole while it is computed again

    sparse: an input that is a TopK output takes what its message takes (`parallel.wire`), the
    embedding's output its token ids

    in flight on stage i of p: min(m, p - i) microbatches; output layer on the last stage: 6 V + 4 H
    a token and rank (logits in bfloat16 and float32, inputs of the final norm and of the layer)

Not counted: buffers of NCCL and kernels, fragments (`assumptions.USABLE_MEMORY`), token ids,
softmax statistics of fused attention, rotary tables.
"""

from dataclasses import dataclass

import torch

from topk_megatron.parallel.wire import WireFormat, wire_format
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes a parameter
_IDS = 16  # bytes of a token's id and position


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank of one pipeline stage.

    Attributes:
        stage: its number.
        weights, gradients, optimizer: of its parameters.
        dense, sparse: activations, without and with sparse saving.
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
        """All of it."""
        return self.states + (self.sparse if sparse_save else self.dense)


def memory_of(shape: Shape, layout: Layout, stage: int) -> Memory:
    """Memory of a rank of pipeline stage `stage`."""
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
    """The stage whose ranks need most, with the saving that the layout chooses."""
    stages = (memory_of(shape, layout, stage) for stage in range(layout.pp))
    return max(stages, key=lambda memory: memory.total(sparse_save=layout.sparse_save))


def wire_of(shape: Shape, *, at_peak: bool = False) -> WireFormat | None:
    """How a TopK output travels and is kept; None where dense is as good.

    Args:
        shape: the model.
        at_peak: at the largest k of an annealing, which memory has to hold, and not at the final k.
    """
    k = max(shape.topk.k, shape.topk.start_k) if at_peak else shape.topk.k
    return wire_format(shape.hidden, k, torch.bfloat16)


def layer_bytes(shape: Shape, layer: int) -> float:
    """Bytes a token that a layer keeps without recompute, over all tensor-parallel ranks."""
    kept = 8 * shape.hidden + 2 * (shape.qkv_width + shape.attention_width)
    kept += (6 if shape.gated else 4) * shape.ffn
    kept += 2 * shape.hidden if shape.dropout else 0
    return kept + (shape.hidden / 8 if layer in shape.topk.residual_layers else 0)


def input_bytes(shape: Shape, layout: Layout, layer: int, *, sparse: bool) -> float:
    """Bytes a token of a layer's input as it is kept.

    What the first layer of a stage received stays dense unless it was sent sparsely. What the
    embedding gave is looked up again, unless there is dropout: every rank keeps ids and positions.
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
    """Bytes of activations at the peak of a step, on one rank of a stage."""
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
