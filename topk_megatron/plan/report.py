"""Presents a plan as text and as plain values for JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from topk_megatron.plan.assumptions import Cluster, assumption_rows
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.search import Estimate, Found, Rejected
from topk_megatron.plan.shape import Shape

FORMAT_VERSION = 1
_GB = 1e9
_KINDS = {
    "memory": "too large for a GPU",
    "divide": "sizes that do not divide",
    "batch": "batches that do not divide",
}


def describe(shape: Shape, cluster: Cluster, found: Found, rows: int, own: Layout | None) -> str:
    """Return the best layouts in a table, figures of the best, and why others were rejected.

    Args:
        shape: The model.
        cluster: The cluster that was searched for.
        found: The outcome of the search.
        rows: Number of layouts to show.
        own: The argument file's own layout, to be marked in the table.
    """
    lines = [
        *_question(shape, cluster),
        "",
        f"  {'TP':>3} {'PP':>3} {'DP':>5}  {'recompute':<9} {'sparse':<10} "
        f"{'GB/GPU':>8} {'s/step':>9} {'tokens/s':>11} {'MFU':>6}  loses most by",
    ]
    best = found.fitting[0]
    for one in found.fitting[:rows]:
        row = _row(shape, cluster, one)
        notes = ["best" if one is best else loss(best, one)]
        notes += ["the file's own"] if own is not None and _same_cut(one.layout, own) else []
        lines.append(f"{row}  {', '.join(notes)}")
    if len(found.fitting) > rows:
        lines.append(f"    and {len(found.fitting) - rows} slower ones that fit")
    return "\n".join([*lines, "", *details(shape, best), *_rejections(found)])


def details(shape: Shape, estimate: Estimate) -> list[str]:
    """Return memory, traffic and time of one layout, as lines of text."""
    memory, traffic, time = estimate.memory, estimate.traffic, estimate.time
    step = ", ".join(f"{name} {seconds:.3g}" for name, seconds in asdict(time).items())
    lines = [
        f"best: {estimate.layout.words()}; {estimate.layout.microbatches(shape)} microbatches per "
        "step and replica",
        f"  GB on a GPU of stage {memory.stage}, the fullest: weights {memory.weights / _GB:.2f}, "
        f"gradients {memory.gradients / _GB:.2f}, optimizer {memory.optimizer / _GB:.2f}",
        f"    activations {memory.dense / _GB:.2f} dense, {memory.sparse / _GB:.2f} with sparse "
        "saving",
        f"  GB that the busiest GPU sends per step: tensor parallel {traffic.tensor / _GB:.2f}, "
        f"data parallel {traffic.data / _GB:.2f}",
        f"    pipeline {traffic.pipeline_dense / _GB:.2f} dense, "
        f"{traffic.pipeline_sparse / _GB:.2f} sparse",
        f"  seconds per step: {step}",
    ]
    if shape.iterations is not None:
        trained = short(shape.iterations * shape.tokens)
        hours = shape.iterations * time.total / 3600
        lasts = f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
        lines.append(f"  {shape.iterations:,} steps, {trained} tokens: {lasts}")
    return lines


def loss(best: Estimate, other: Estimate) -> str:
    """Return the part of a step in which a layout is furthest behind the best."""
    parts = asdict(best.time)
    more = {name: seconds - parts[name] for name, seconds in asdict(other.time).items()}
    name = max(more, key=lambda part: more[part])
    return f"{name} +{more[name]:.2g} s" if more[name] > 0 else "nothing"


def short(count: float) -> str:
    """Return a count in the form 7.05B or 97.5M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"


def to_json(shape: Shape, cluster: Cluster, found: Found, own: Layout | None) -> dict[str, Any]:
    """Return everything, with bytes and seconds as numbers."""
    return {
        "format_version": FORMAT_VERSION,
        "note": "estimates; nothing here was measured",
        "parameters": shape.parameters,
        "tokens_per_step": shape.tokens,
        "cluster": {**asdict(cluster), "gpus": cluster.gpus, "usable_memory": cluster.memory},
        "own_layout": None if own is None else asdict(own),
        "layouts": [_values(shape, cluster, estimate) for estimate in found.fitting],
        "rejected": [asdict(one) for one in found.rejected],
        "assumptions": [
            dict(zip(("name", "value", "source"), row, strict=True)) for row in assumption_rows()
        ],
    }


def assumption_table() -> str:
    """Return the table of assumptions as Markdown."""
    lines = ["| assumed | value | source |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in assumption_rows())])


def _question(shape: Shape, cluster: Cluster) -> list[str]:
    layers = shape.topk.residual_layers
    sparse = f"k {shape.topk.k} at {len(layers)} of them" if layers else "dense"
    return [
        f"{short(shape.parameters)} parameters: {shape.layers} layers, {sparse}, H "
        f"{shape.hidden}; {shape.global_batch:,} x {shape.sequence:,} tokens per step",
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, "
        f"{cluster.memory / _GB:.0f} of {cluster.gpu.memory / _GB:.0f} GB usable; "
        f"{cluster.inside / _GB:g} GB/s per GPU inside a node, {cluster.between / _GB:g} between",
        f"ESTIMATES with kernels at {cluster.efficiency:.0%} of the peak, an assumption "
        "(--assumptions lists all); nothing was measured",
    ]


def _row(shape: Shape, cluster: Cluster, estimate: Estimate) -> str:
    layout, time = estimate.layout, estimate.time
    return (
        f"  {layout.tp:>3} {layout.pp:>3} {layout.dp:>5}  "
        f"{'full' if layout.recompute else 'none':<9} {_sparse(layout):<10} "
        f"{estimate.bytes / _GB:>8.1f} {time.total:>9.3g} "
        f"{estimate.tokens_per_second(shape):>11,.0f} "
        f"{estimate.utilization(shape, cluster):>6.1%}"
    )


def _same_cut(one: Layout, other: Layout) -> bool:
    return (one.tp, one.pp, one.recompute) == (other.tp, other.pp, other.recompute)


def _sparse(layout: Layout) -> str:
    parts = {"p2p": layout.sparse_p2p, "save": layout.sparse_save}
    return ", ".join(name for name, is_on in parts.items() if is_on) or "-"


def _rejections(found: Found) -> Iterator[str]:
    if found.rejected:
        yield "\nrejected:"
    for kind, words in _KINDS.items():
        of_kind = [one for one in found.rejected if one.kind == kind]
        if of_kind:
            nearest: Rejected = min(of_kind, key=lambda one: one.excess)
            which = "the nearest" if kind == "memory" else "such as"
            yield f"  {len(of_kind):>3} {words}; {which} {nearest.words}: {nearest.detail}"


def _values(shape: Shape, cluster: Cluster, estimate: Estimate) -> dict[str, Any]:
    return {
        **asdict(estimate.layout),
        "microbatches": estimate.layout.microbatches(shape),
        "bytes_per_gpu": estimate.bytes,
        "memory": asdict(estimate.memory),
        "traffic": asdict(estimate.traffic),
        "seconds": {**asdict(estimate.time), "total": estimate.time.total},
        "tokens_per_second": estimate.tokens_per_second(shape),
        "mfu": estimate.utilization(shape, cluster),
    }
