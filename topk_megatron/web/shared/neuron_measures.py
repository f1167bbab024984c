"""Collects the numbers of every neuron, by which a report can be searched and sorted.

Shapes: L recorded layers, N neurons per layer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import read_table

# pyarrow makes its functions at import, where a type checker does not see them.
compute: Any = pyarrow.compute

_ENTROPY = {
    "token_entropy": ("Token entropy", "by count, corrected for sample size"),
    "token_entropy_plugin": ("Token entropy, uncorrected", "by count"),
    "token_entropy_mass": ("Token entropy by mass", "tokens weighted by |value|"),
    "token_entropy_top": ("Token entropy of examples", "over the strongest examples"),
    "semantic_entropy": ("Semantic entropy", "over clusters of the examples' contexts"),
}
_TRACK = {
    "drift": ("Drift", "share", "mean change of its token distribution between checkpoints"),
    "late_drift": ("Late drift", "share", "the same over the second half of training"),
    "formed_iteration": ("Formed at", "iteration", "from here on it resembles its final self"),
    "specialised_iteration": ("Specialised at", "iteration", "from here on it stays specialised"),
}


@dataclass(frozen=True)
class Measure:
    """One number of every neuron.

    Attributes:
        key: its name in the search box.
        label: its name for a reader.
        unit: ``bits``, ``share``, ``iteration``, or nothing for a plain number.
        hint: what it means, in a few words.
        values: float32 [L, N], NaN where it was not measured.
    """

    key: str
    label: str
    unit: str
    hint: str
    values: np.ndarray

    def describe(self) -> dict[str, Any]:
        """Returns what a page needs to show it."""
        return {"key": self.key, "label": self.label, "unit": self.unit, "hint": self.hint}

    def of(self, place: int, neuron: int) -> float | None:
        """Returns one neuron's value; None where it was not measured.

        Args:
            place: the layer's place among the recorded layers.
            neuron: the neuron's number in that layer.
        """
        value = float(self.values[place, neuron])
        return None if np.isnan(value) else value


class Grid:
    """Puts rows of a table in their places by layer and neuron."""

    def __init__(self, run: Run) -> None:
        self.shape = (len(run.layers), run.width)
        self._place = np.full(max(run.layers, default=0) + 1, -1)
        self._place[list(run.layers)] = np.arange(len(run.layers))

    def fill(self, table: pa.Table, column: str, layer: str = "layer") -> np.ndarray:
        """Returns a column as float32 [L, N], with NaN where there is no row or no value."""
        grid = np.full(self.shape, np.nan, np.float32)
        layers, neurons = table[layer].to_numpy(), table["neuron"].to_numpy()
        values = table[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
        known = (layers < len(self._place)) & (neurons < self.shape[1])
        place = self._place[np.where(known, layers, 0)]
        known &= place >= 0
        grid[place[known], neurons[known]] = values[known]
        return grid


def collect_measures(study: Path, run: Run) -> list[Measure]:
    """Returns everything that the study measured of this run's neurons, in a fixed order.

    Raises:
        AnalysisError: a table of the study is damaged.
    """
    grid = Grid(run)
    found = _activity(run, grid)
    found += _entropies(study, run, grid)
    if _is_last_checkpoint(study, run):
        found += _tracked(study, grid)
    found += _steered(study, run, grid)
    return [one for one in found if np.isfinite(one.values).any()]


def _activity(run: Run, grid: Grid) -> list[Measure]:
    counts = grid.fill(run.neurons, "count")
    tokens = max(1, run.manifest["corpus"]["tokens"])
    means = grid.fill(run.neurons, "sum") / np.where(counts > 0, counts, np.nan)
    top = grid.fill(run.neurons, "max")
    return [
        Measure("count", "Activations", "", "how often it was selected", counts),
        Measure(
            "share", "Active on", "share", "share of the tokens of the corpus", counts / tokens
        ),
        Measure("max", "Largest value", "", "over the corpus", top),
        Measure("mean", "Mean value", "", "where it is active", means),
    ]


def _entropies(study: Path, run: Run, grid: Grid) -> list[Measure]:
    path = study / "entropy" / "neurons.parquet"
    if not path.is_file():
        return []
    table = read_table(path, ["run", "layer", "neuron", "semantic_clusters", *_ENTROPY])
    table = table.filter(compute.equal(table["run"], run.name))
    found = [
        Measure(key, label, "bits", hint, grid.fill(table, key))
        for key, (label, hint) in _ENTROPY.items()
    ]
    clusters = grid.fill(table, "semantic_clusters")
    return [*found, Measure("clusters", "Semantic clusters", "", "of its contexts", clusters)]


def _is_last_checkpoint(study: Path, run: Run) -> bool:
    """Returns whether `track` followed this run's neurons, which are those of the last checkpoint.

    The run is either the last one of the trajectory or another recording of the same weights.
    """
    path = study / "track" / "checkpoints.parquet"
    if not path.is_file():
        return False
    table = read_table(path, ["run", "iteration"])
    if run.name in table["run"].unique().to_pylist():
        return True
    last = compute.max(table["iteration"]).as_py()
    return last is not None and run.manifest["model"]["iteration"] == last and run.kind == "topk"


def _tracked(study: Path, grid: Grid) -> list[Measure]:
    path = study / "track" / "neurons.parquet"
    table = read_table(path)
    found = [
        Measure(key, label, unit, hint, grid.fill(table, key))
        for key, (label, unit, hint) in _TRACK.items()
    ]
    path = study / "track" / "layers.parquet"
    if path.is_file():
        kept = grid.fill(read_table(path), "similarity", "layer_a")
        hint = "how similar it is to the same neuron of the next layer"
        found.append(Measure("next_layer", "Similarity to next layer", "share", hint, kept))
    return found


def _steered(study: Path, run: Run, grid: Grid) -> list[Measure]:
    """Returns each neuron's success at the strength that works best, and its cost there."""
    best = best_steering(study, run)
    if best is None:
        return []
    return [
        Measure(
            "steer_success", "Steering success", "share",
            "rise in its concept tokens at the best strength", grid.fill(best, "success"),
        ),
        Measure(
            "steer_damage", "Steering damage", "bits",
            "log2 of the ratio of perplexities at that strength", grid.fill(best, "damage"),
        ),
    ]  # fmt: skip


def best_steering(study: Path, run: Run) -> pa.Table | None:
    """Returns each steered neuron's row of largest success; None if nothing was steered."""
    path = study / "steer" / "neurons.parquet"
    if not path.is_file():
        return None
    columns = ["run", "layer", "neuron", "control", "strength", "success", "damage"]
    table = read_table(path, columns)
    keep = compute.and_(compute.equal(table["run"], run.name), compute.invert(table["control"]))
    table = table.filter(compute.and_(keep, compute.is_valid(table["success"])))
    if not table.num_rows:
        return None
    order: Any = [("layer", "ascending"), ("neuron", "ascending"), ("success", "descending")]
    table = table.sort_by(order)
    layers, neurons = table["layer"].to_numpy(), table["neuron"].to_numpy()
    first = np.append(True, (np.diff(layers) != 0) | (np.diff(neurons) != 0))
    return table.filter(pa.array(first))
