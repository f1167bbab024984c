"""Bytes that one GPU sends per step: pipeline, tensor and data parallel.

Formulas (bytes; symbols as in `topk_megatron.plan.memory`, l layers of a stage):

    pipeline   2 H s b / t forward over a boundary and as much back, m times; if sparse, after a
               TopK: values with indices or bitmask forward, k values back (`parallel.wire`)
    tensor     collectives of 2 H s b (t - 1) / t: a layer has 4 forward, 6 backward (2 of which
               gather inputs again, hidden by other work) and 4 more under recompute; l layers, m
               times
    data       4 P (d - 1) / d to reduce gradients and 2 P (d - 1) / d to gather weights
"""

from dataclasses import dataclass

from topk_megatron.plan.layout import Layout
from topk_megatron.plan.memory import GRADIENT, WEIGHT, wire_of
from topk_megatron.plan.shape import Shape

_FORWARD, _BACKWARD, _HIDDEN_BACKWARD = 4, 6, 2  # collectives of a layer


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that the busiest GPU sends per step.

    Attributes:
        pipeline_dense: Dense messages to the stages before and after.
        pipeline_sparse: The same messages, sparse where they can be.
        tensor: Messages to its tensor-parallel ranks.
        gradients: Gradients to its data-parallel ranks.
        weights: Weights to its data-parallel ranks.
    """

    pipeline_dense: float
    pipeline_sparse: float
    tensor: float
    gradients: float
    weights: float

    @property
    def data(self) -> float:
        """Bytes to its data-parallel ranks: gradients and weights."""
        return self.gradients + self.weights


def traffic_of(shape: Shape, layout: Layout) -> Traffic:
    """Return the traffic of the busiest GPU."""
    parameters = max(
        shape.stage_parameters(layout.tp, layout.pp, stage) for stage in {0, layout.pp - 1}
    )
    share = (layout.dp - 1) / layout.dp
    count = layout.microbatches(shape)
    return Traffic(
        pipeline_dense=count * _busiest(shape, layout, sparse=False),
        pipeline_sparse=count * _busiest(shape, layout, sparse=True),
        tensor=count * (shape.layers // layout.pp) * tensor_bytes(shape, layout),
        gradients=GRADIENT * parameters * share,
        weights=WEIGHT * parameters * share,
    )


def message_bytes(
    shape: Shape, layout: Layout, boundary: int, *, sparse: bool
) -> tuple[float, float]:
    """Return the bytes of a microbatch from stage `boundary` to the next, and of its gradient."""
    tokens = layout.tokens(shape)
    last_layer = shape.stage_layers(layout.pp, boundary)[-1]
    wire = wire_of(shape) if sparse and last_layer in shape.topk.residual_layers else None
    if wire is None:
        return 2 * tokens * shape.hidden, 2 * tokens * shape.hidden
    rows = round(tokens)
    return wire.message_bytes(rows), wire.values_bytes(rows)


def tensor_bytes(shape: Shape, layout: Layout, *, exposed: bool = False) -> float:
    """Return the bytes of a layer's collectives per microbatch.

    Args:
        shape: The model.
        layout: The layout.
        exposed: Leave out those that other work hides.
    """
    collectives = _FORWARD + _BACKWARD - (_HIDDEN_BACKWARD if exposed else 0)
    collectives += _FORWARD if layout.recompute else 0
    return collectives * 2 * layout.tokens(shape) * shape.hidden * (layout.tp - 1)


def _busiest(shape: Shape, layout: Layout, *, sparse: bool) -> float:
    """Return the bytes per microbatch that the busiest stage sends, forward and back."""
    sent = [0.0] * layout.pp
    for boundary in range(layout.pp - 1):
        forward, backward = message_bytes(shape, layout, boundary, sparse=sparse)
        sent[boundary] += forward
        sent[boundary + 1] += backward
    return max(sent)
