"""Models the gain of sparse transport and sparse saving at scale: the tables of docs/scaling.md.

    python benchmarks/scaling_model.py

Nothing here is measured. Formulas and assumptions are the planner's (topk_megatron/plan/).
"""

from collections.abc import Iterator
from pathlib import Path

from topk_megatron.plan.assumptions import LINKS, cluster_of
from topk_megatron.plan.command_lines import read_flags, shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.memory import input_bytes, memory_of
from topk_megatron.plan.shape import Shape
from topk_megatron.plan.step_time import compute_seconds, transport_seconds
from topk_megatron.plan.traffic import message_bytes

REPOSITORY = Path(__file__).resolve().parents[1]

# One sequence of 4096 tokens per microbatch, a TopK at every boundary, no dropout.
COMMON = [
    *("--seq-length", "4096", "--micro-batch-size", "1"),
    *("--topk-layers", "all", "--topk-anneal", "constant", "--hidden-dropout", "0"),
]
GPT3 = [
    *("--num-layers", "96", "--hidden-size", "12288", "--num-attention-heads", "96"),
    *("--vocab-size", "51200", "--position-embedding-type", "rope"),
]
# Tensor- and pipeline-parallel sizes, chosen to cut every model into a pipeline.
CUTS = {"1b": (1, 4), "7b": (2, 4), "70b": (8, 8), "175b": (8, 12), "500b": (8, 24)}


def models() -> Iterator[tuple[str, Shape, int, int]]:
    """Yield the name, shape, TP and PP of each model."""
    for name, (tp, pp) in CUTS.items():
        path = REPOSITORY / "configs" / f"{name}.args"
        flags = GPT3 if name == "175b" else read_flags(path)
        yield name, shape_of([*flags, *COMMON]), tp, pp


def print_transport() -> None:
    """Print the table of transport's share of step time."""
    links = {"NVLink (450 GB/s)": None, **{link.name: name for name, link in LINKS.items()}}
    print("| model | layers x hidden | TP x PP | MB a transfer: dense, forward, backward | " + " | ".join(links) + " |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|" + "---|" * len(links))
    for name, shape, tp, pp in models():
        layout = Layout(tp=tp, pp=pp, dp=1)
        dense, _ = message_bytes(shape, layout, 0, sparse=False)
        sizes = (dense, *message_bytes(shape, layout, 0, sparse=True))
        megabytes = ", ".join(f"{size / 1e6:.2f}" for size in sizes)
        cells = [" → ".join(_shares(shape, layout, link)) for link in links.values()]
        print(
            f"| {name} | {shape.layers} x {shape.hidden} | {tp} x {pp} | {megabytes} | "
            + " | ".join(cells)
            + " |"
        )


def _shares(shape: Shape, layout: Layout, link: str | None) -> Iterator[str]:
    """Yield transport over compute of a middle stage, dense and sparse.

    Without a link, all ranks are on one large node.
    """
    node = layout.ranks if link is None else 1
    cluster = cluster_of("h100", layout.ranks // node, node, link or "ndr")
    compute = compute_seconds(shape, layout, cluster, stage=1)
    for sparse in (False, True):
        share = transport_seconds(shape, layout, cluster, sparse=sparse) / compute
        yield f"{100 * share:.1f} %"


def print_memory() -> None:
    """Print the table of saved activations: inputs of recomputed layers on the first stage."""
    print("| model | parameters and optimizer, GB a GPU | kept, sequence parallel, GB | kept, not sequence parallel, GB |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|")
    for name, shape, tp, pp in models():
        layout = Layout(tp=tp, pp=pp, dp=1, recompute=True, sparse_save=True)
        kept = [_kept(shape, layout, sparse=sparse) for sparse in (False, True)]
        cells = [" → ".join(f"{split * one / 1e9:.2f}" for one in kept) for split in (1, tp)]
        states = memory_of(shape, layout, 0).states / 1e9
        print(f"| {name} | {states:.1f} | " + " | ".join(cells) + " |")


def _kept(shape: Shape, layout: Layout, *, sparse: bool) -> float:
    inputs = sum(
        input_bytes(shape, layout, layer, sparse=sparse)
        for layer in shape.stage_layers(layout.pp, 0)
    )
    return inputs * layout.tokens(shape) * layout.pp


if __name__ == "__main__":
    print_transport()
    print()
    print_memory()
