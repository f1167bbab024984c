"""Draws the pictures of RESULTS.md."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from compare import Measures, entropy, gap, layers_of
from grid import Run
from matplotlib.ticker import MaxNLocator

mpl.use("Agg")
import matplotlib.pyplot as plt

TOPK, DENSE, GREY = "#d95f02", "#1f4e79", "#9a9a9a"
Variants = dict[str, list[Run]]


def plot_gaps(variants: Variants, measures: Measures, path: Path) -> None:
    """Draw perplexity above the dense twin: one row per variant, with its interval and seeds."""
    names = [name for name in variants if name != "dense"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.34 * len(names)), dpi=150)
    for place, name in enumerate(names):
        found = gap(variants[name], variants["dense"], measures)
        low, value, high = found.percent.low, found.percent.value, found.percent.high
        colour = TOPK if name == "topk" else DENSE
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour)
        axes.plot(found.seeds, [place] * len(found.seeds), "|", color=GREY, markersize=11)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("perplexity above the dense twin, % (bar: 95 % over text; ticks: seeds)")
    _finish(figure, axes, path)


def plot_entropy(variants: Variants, measures: Measures, path: Path) -> None:
    """Draw mean token entropy by layer, with intervals."""
    k = variants["topk"][0].k
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    for name, colour, shift in (("topk", TOPK, -0.04), ("dense", DENSE, 0.04)):
        layers = layers_of(variants[name], measures, k)
        found = [entropy(variants[name], measures, k, layer) for layer in layers]
        known = [(n, f) for n, f in zip(layers, found, strict=True) if f is not None]
        places = np.array([n for n, _ in known]) + shift
        values = np.array([[f.low, f.value, f.high] for _, f in known]).reshape(-1, 3).T
        errors = [values[1] - values[0], values[2] - values[1]]
        label = "TopK" if name == "topk" else "dense, its k largest"
        axes.errorbar(places, values[1], errors, fmt="o-", color=colour, capsize=3, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("token entropy, bits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    _finish(figure, axes, path)


def plot_training(variants: Variants, measures: Measures, path: Path) -> None:
    """Draw every variant's training loss for the first seed, smoothed over ten steps."""
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for name, runs in variants.items():
        points = np.array(measures[runs[0].name]["training_loss"], float)
        width = min(10, len(points))
        smooth = np.convolve(points[:, 1], np.ones(width) / width, mode="valid")
        colour = {"dense": DENSE, "topk": TOPK}.get(name, GREY)
        strong = name in ("dense", "topk")
        axes.plot(
            points[width - 1 :, 0],
            smooth,
            color=colour,
            linewidth=1.8 if strong else 0.8,
            label=name if strong else None,
            zorder=2 if strong else 1,
        )
    axes.plot([], [], color=GREY, linewidth=0.8, label="other variants")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False)
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
