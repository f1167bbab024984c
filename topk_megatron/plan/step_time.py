"""Seconds of a training step, from operations and bytes.

    a stage's microbatch   operations / (efficiency · peak), four thirds under recompute; exposed
                           tensor-parallel bytes; TopK as passes over the hidden state: 2 forward
                           and 2 backward, 2 more under recompute
    transport              forward and backward message of the slowest boundary; if sparse, 4 passes
                           and the launches each way for packing and unpacking. Nothing overlaps
    pipeline               1F1B: the sum over stages, and m - 1 times the slowest; no virtual stages
    data parallel          gradients overlap with the backward pass of the last microbatch, weights
                           with the forward pass of the first; the excess is added

Not counted are the optimizer's step, evaluation, checkpoints, the data loader, and the gradients of
tied embeddings between the first and the last stage.
"""

from dataclasses import dataclass

from topk_megatron.plan.assumptions import PACK_LAUNCHES, Cluster
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape
from topk_megatron.plan.traffic import Traffic, message_bytes, tensor_bytes

_FORWARD_SHARE = 1 / 3  # of a microbatch's time without recompute; backward takes the rest
_PACK_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The parts of a step, in seconds.

    Attributes:
        compute: Operations of the slowest stage, over all microbatches.
        tensor: Exposed tensor-parallel traffic of that stage.
        topk: The TopK operator of that stage.
        transport: Transport between stages, over all microbatches.
        bubble: Time in which a stage waits for others.
        data: Data-parallel traffic that nothing hides.
    """

    compute: float
    tensor: float
    topk: float
    transport: float
    bubble: float
    data: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        parts = (self.compute, self.tensor, self.topk, self.transport, self.bubble, self.data)
        return sum(parts)


def step_time(shape: Shape, layout: Layout, cluster: Cluster, traffic: Traffic) -> StepTime:
    """Estimate the time of a step."""
    parts = [_stage_parts(shape, layout, cluster, stage) for stage in range(layout.pp)]
    slowest = max(parts, key=sum)
    count = layout.microbatches(shape)
    sent = transport_seconds(shape, layout, cluster, sparse=layout.sparse_p2p)
    others = sum(map(sum, parts)) - sum(slowest)
    return StepTime(
        compute=count * slowest[0],
        tensor=count * slowest[1],
        topk=count * slowest[2],
        transport=count * sent,
        bubble=others + (layout.pp - 1) * sent,
        data=_data_seconds(layout, cluster, traffic, sum(slowest)),
    )


def compute_seconds(shape: Shape, layout: Layout, cluster: Cluster, stage: int) -> float:
    """Return the seconds of a microbatch's operations on one stage, forward and backward."""
    layers = len(shape.stage_layers(layout.pp, stage)) * shape.layer_flops()
    layers *= 4 if layout.recompute else 3
    output = 3 * shape.output_flops(layout.tp) if stage == layout.pp - 1 else 0
    return (layers + output) * layout.tokens(shape) / cluster.flops


def transport_seconds(shape: Shape, layout: Layout, cluster: Cluster, *, sparse: bool) -> float:
    """Return the seconds of a microbatch's messages over the slowest boundary, both ways."""
    inside = layout.ranks <= cluster.gpus_per_node
    slowest = 0.0
    for boundary in range(layout.pp - 1):
        dense = message_bytes(shape, layout, boundary, sparse=False)
        chosen = message_bytes(shape, layout, boundary, sparse=sparse)
        seconds = cluster.seconds(sum(chosen), inside=inside)
        if chosen != dense:
            passes = _PACK_PASSES * dense[0] / cluster.passes
            seconds += 2 * (passes + PACK_LAUNCHES.value)
        slowest = max(slowest, seconds)
    return slowest


def _stage_parts(
    shape: Shape, layout: Layout, cluster: Cluster, stage: int
) -> tuple[float, float, float]:
    """Return a microbatch's seconds of operations, exposed tensor-parallel traffic and TopK."""
    layers = shape.stage_layers(layout.pp, stage)
    sent = len(layers) * tensor_bytes(shape, layout, exposed=True)
    passes = 6 if layout.recompute else 4
    chosen = len(set(layers) & set(shape.topk.residual_layers))
    state = 2 * layout.tokens(shape) * shape.hidden
    return (
        compute_seconds(shape, layout, cluster, stage),
        cluster.seconds(sent, inside=layout.tp <= cluster.gpus_per_node),
        passes * chosen * state / cluster.passes,
    )


def _data_seconds(layout: Layout, cluster: Cluster, traffic: Traffic, microbatch: float) -> float:
    inside = layout.tp * layout.dp <= cluster.gpus_per_node
    # A ring over the ranks of a node leaves it through as many ports as it has ranks there.
    ports = max(1, min(layout.dp, cluster.gpus_per_node // layout.tp))
    gradients = cluster.seconds(traffic.gradients, inside=inside, ports=ports)
    weights = cluster.seconds(traffic.weights, inside=inside, ports=ports)
    forward = microbatch * _FORWARD_SHARE
    return max(0.0, gradients - (microbatch - forward)) + max(0.0, weights - forward)
