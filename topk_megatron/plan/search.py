"""Tries every layout of a model on a cluster: which fit, fastest first, and why others do not.

The search tries tensor-parallel sizes that divide a node's GPUs and pipeline sizes that divide the
layers, with and without full recompute and the sparse forms. Every layout uses all GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from topk_megatron.errors import ConfigError
from topk_megatron.plan.assumptions import Cluster
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.memory import Memory, fullest, wire_of
from topk_megatron.plan.shape import Shape
from topk_megatron.plan.step_time import StepTime, step_time
from topk_megatron.plan.traffic import Traffic, traffic_of

# Estimates closer than this count as equal: the simpler layout wins.
TIE = 0.02


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of one layout.

    Attributes:
        layout: The layout.
        memory: The memory of a rank of the fullest stage.
        traffic: The bytes that the busiest GPU sends per step.
        time: The seconds per step.
    """

    layout: Layout
    memory: Memory
    traffic: Traffic
    time: StepTime

    @property
    def bytes(self) -> float:
        """Bytes on a GPU of the fullest stage."""
        return self.memory.total(sparse_save=self.layout.sparse_save)

    def tokens_per_second(self, shape: Shape) -> float:
        """Return the tokens per second over all GPUs."""
        return shape.tokens / self.time.total

    def utilization(self, shape: Shape, cluster: Cluster) -> float:
        """Return the MFU: the model's operations, without recompute, over the GPUs' peak."""
        done = shape.model_flops() * self.tokens_per_second(shape)
        return done / (self.layout.ranks * cluster.gpu.flops)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A layout that is not possible.

    Attributes:
        words: The layout, or the sizes that do not divide.
        kind: The kind of reason: ``memory``, ``divide`` or ``batch``.
        detail: The reason in this case.
        excess: How far it is from being possible, to find the nearest of a kind.
    """

    words: str
    kind: str
    detail: str
    excess: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search.

    Attributes:
        fitting: Layouts that fit, one for each TP, PP and recompute; the best first.
        rejected: The other layouts.
    """

    fitting: list[Estimate]
    rejected: list[Rejected]


def estimate(shape: Shape, layout: Layout, cluster: Cluster) -> Estimate:
    """Estimate one layout."""
    traffic = traffic_of(shape, layout)
    return Estimate(
        layout=layout,
        memory=fullest(shape, layout),
        traffic=traffic,
        time=step_time(shape, layout, cluster, traffic),
    )


def search(shape: Shape, cluster: Cluster) -> Found:
    """Try every layout.

    Raises:
        ConfigError: If none fits or none divides; says what the nearest lacks.
    """
    rejected: list[Rejected] = []
    fitting: list[Estimate] = []
    for tp, pp, dp in _sizes(shape, cluster, rejected):
        for recompute in (False, True):
            variants = [
                estimate(shape, layout, cluster)
                for layout in _variants(shape, tp, pp, dp, recompute=recompute)
            ]
            possible = [one for one in variants if one.bytes <= cluster.memory]
            if possible:
                fitting.append(_simplest(possible))
            else:
                rejected.append(_too_large(min(variants, key=lambda one: one.bytes), cluster))
    if not fitting:
        raise ConfigError(_why_none(shape, cluster, rejected))
    best = _simplest(fitting)
    rest = sorted((one for one in fitting if one is not best), key=lambda one: one.time.total)
    return Found(fitting=[best, *rest], rejected=rejected)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def tensor_obstacle(shape: Shape, tp: int) -> str | None:
    """Return the sizes of the model that a tensor-parallel size does not divide, or None."""
    parts = {
        "attention heads": shape.heads,
        "query groups": shape.groups,
        "ffn": shape.ffn,
        "sequence": shape.sequence,
    }
    odd = [f"{name} {size}" for name, size in parts.items() if size % tp]
    return ", ".join(odd) or None


def _sizes(
    shape: Shape, cluster: Cluster, rejected: list[Rejected]
) -> Iterator[tuple[int, int, int]]:
    for tp in divisors(cluster.gpus_per_node):
        if (odd := tensor_obstacle(shape, tp)) is not None:
            detail = f"{odd} cannot be divided by {tp}"
            rejected.append(Rejected(words=f"TP {tp}", kind="divide", detail=detail, excess=tp))
            continue
        for pp in divisors(shape.layers):
            if pp * tp > cluster.gpus:
                continue
            words = f"TP {tp}, PP {pp}"
            if cluster.gpus % (tp * pp):
                detail = f"{cluster.gpus} GPUs are not a multiple of {tp * pp}"
                rejected.append(Rejected(words=words, kind="divide", detail=detail, excess=pp))
                continue
            dp = cluster.gpus // (tp * pp)
            if shape.global_batch % (shape.micro_batch * dp):
                detail = (
                    f"a batch of {shape.global_batch} is not a multiple of DP {dp} x "
                    f"microbatches of {shape.micro_batch}"
                )
                rejected.append(Rejected(words=words, kind="batch", detail=detail, excess=dp))
                continue
            yield tp, pp, dp


def _variants(shape: Shape, tp: int, pp: int, dp: int, *, recompute: bool) -> Iterator[Layout]:
    """Yield a layout for each sparse form: transport, and saving under recompute."""
    can_be_sparse = bool(shape.topk.residual_layers) and wire_of(shape) is not None
    for sparse_p2p in (False, True) if can_be_sparse and pp > 1 else (False,):
        for sparse_save in (False, True) if can_be_sparse and recompute else (False,):
            yield Layout(
                tp=tp,
                pp=pp,
                dp=dp,
                recompute=recompute,
                sparse_p2p=sparse_p2p,
                sparse_save=sparse_save,
            )


def _simplest(estimates: list[Estimate]) -> Estimate:
    """Return the simplest of those that are as good as the fastest."""
    least = min(one.time.total for one in estimates)
    near = [one for one in estimates if one.time.total <= least * (1 + TIE)]

    def simplicity(one: Estimate) -> tuple[bool, bool, bool, int, int, float]:
        layout = one.layout
        sparse = layout.sparse_p2p, layout.sparse_save
        return *sparse, layout.recompute, layout.pp, layout.tp, one.time.total

    return min(near, key=simplicity)


def _too_large(one: Estimate, cluster: Cluster) -> Rejected:
    needs, has = one.bytes / 1e9, cluster.memory / 1e9
    return Rejected(
        words=one.layout.words(),
        kind="memory",
        detail=f"needs {needs:.1f} GB per GPU of {has:.1f}",
        excess=needs,
    )


def _why_none(shape: Shape, cluster: Cluster, rejected: list[Rejected]) -> str:
    too_large = [one for one in rejected if one.kind == "memory"]
    if too_large:
        nearest = min(too_large, key=lambda one: one.excess)
        return (
            f"no layout fits on {cluster.gpus} x {cluster.gpu.name}: the nearest, {nearest.words}, "
            f"{nearest.detail}; add --nodes or choose a GPU with more memory"
        )
    reasons = "; ".join(dict.fromkeys(one.detail for one in rejected[:3]))
    return (
        f"no layout divides {cluster.gpus} GPUs, {shape.layers} layers and a batch of "
        f"{shape.global_batch} ({reasons}); change --nodes or --global-batch-size"
    )
