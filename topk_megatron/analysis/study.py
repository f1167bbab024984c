"""The study directory: where files lie, and reading the runs in it with checks."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.files import file_facts, replacing

FORMAT_VERSION = 1
COMMANDS = ("entropy", "track", "steer", "sae")
_RUN_NAME = re.compile(r"[A-Za-z0-9._@-]+")


@dataclass(frozen=True)
class Histogram:
    """Token histograms of one layer, of all neurons in a row.

    Attributes:
        width: neurons N of the layer.
        vocab_size: tokens V.
        starts: int64 [N + 1]; neuron n has the entries starts[n] to starts[n + 1].
        tokens: int32, ascending within a neuron.
        counts: int64, activations on that token.
        mass: float64, sum of |value| on that token.
    """

    width: int
    vocab_size: int
    starts: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    mass: np.ndarray

    def of(self, neuron: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, counts and mass of one neuron."""
        part = slice(self.starts[neuron], self.starts[neuron + 1])
        return self.tokens[part], self.counts[part], self.mass[part]

    @property
    def totals(self) -> np.ndarray:
        """Activations of every neuron, int64 [N]."""
        sums = np.concatenate([[0], np.cumsum(self.counts)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    @property
    def neurons(self) -> np.ndarray:
        """The neuron of every entry, int64."""
        return np.repeat(np.arange(self.width), np.diff(self.starts))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: its folder.
        manifest: its manifest.json.
    """

    directory: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """RUN."""
        return self.manifest["run"]

    @property
    def kind(self) -> str:
        """``topk``, ``dense`` or ``sae``."""
        return self.manifest["kind"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Recorded layers."""
        return tuple(self.manifest["layers"])

    @property
    def width(self) -> int:
        """Neurons a layer."""
        return self.manifest["width"]

    @property
    def vocab_size(self) -> int:
        """Tokens of the model."""
        return self.manifest["model"]["vocab_size"]

    @cached_property
    def neurons(self) -> pa.Table:
        """neurons.parquet."""
        return self.table("neurons.parquet")

    @cached_property
    def vocabulary(self) -> pa.Table:
        """vocabulary.parquet."""
        return self.table("vocabulary.parquet")

    @cached_property
    def examples(self) -> pa.Table:
        """examples.parquet."""
        return self.table("examples.parquet")

    def table(self, name: str) -> pa.Table:
        """Read one of the run's files, checked against the manifest.

        Raises:
            AnalysisError: it is missing, or its bytes are not those that were written.
        """
        path = self.directory / name
        self.check(name)
        return read_table(path)

    def check(self, name: str) -> None:
        """Compare a file with the manifest's size and SHA-256."""
        path = self.directory / name
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise AnalysisError(f"the run {self.name} has no {name}; record it again")
        if not path.is_file() or file_facts(path) != expected:
            state = "damaged" if path.is_file() else "missing"
            raise AnalysisError(
                f"{path} is {state}: it is not the file that its manifest.json describes; record "
                f"the run again with --overwrite"
            )

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that was not recorded."""
        if layer not in self.layers:
            raise AnalysisError(
                f"layer {layer} was not recorded in the run {self.name}; its layers are "
                f"{', '.join(map(str, self.layers))}"
            )

    def check_neuron(self, neuron: int) -> None:
        """Refuse a neuron that the layers do not have."""
        if not 0 <= neuron < self.width:
            raise AnalysisError(
                f"neuron {neuron} is out of range; the run {self.name} has neurons 0 to "
                f"{self.width - 1}"
            )

    def histogram(self, layer: int) -> Histogram:
        """Token histograms of one layer."""
        self.check_layer(layer)
        table = self.table(f"histograms/layer-{layer:03d}.parquet")
        neurons, tokens, counts, mass = (column.to_numpy() for column in table.columns)
        starts = np.searchsorted(neurons, np.arange(self.width + 1))
        return Histogram(self.width, self.vocab_size, starts, tokens, counts, mass)


def check_run_name(name: str) -> None:
    """Refuse names that would not be one folder."""
    if not _RUN_NAME.fullmatch(name) or name.startswith("."):
        raise AnalysisError(
            f"a run is named with letters, digits, '.', '_', '-' and '@', got {name!r}"
        )


def run_directory(study: Path, name: str) -> Path:
    """Where a run lies."""
    check_run_name(name)
    return study / "runs" / name


def open_run(study: Path, name: str) -> Run:
    """A finished run of a study.

    Raises:
        AnalysisError: there is none of this name, it is unfinished, or of another format.
    """
    directory = run_directory(study, name)
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        if directory.is_dir():
            raise AnalysisError(f"the run {name} is unfinished; give its record command again")
        known = ", ".join(list_runs(study)) or "none"
        raise AnalysisError(f"{study} has no run {name!r}; recorded are: {known}")
    content = read_json(manifest)
    if content.get("format_version") != FORMAT_VERSION:
        raise AnalysisError(
            f"{manifest} has format version {content.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; record the run again"
        )
    return Run(directory, content)


def list_runs(study: Path) -> list[str]:
    """Names of the finished runs of a study."""
    return sorted(path.parent.name for path in (study / "runs").glob("*/manifest.json"))


def open_runs(study: Path, names: list[str]) -> list[Run]:
    """Runs to compare: of one corpus and one vocabulary.

    Raises:
        AnalysisError: one is missing, or they were recorded on different text.
    """
    runs = [open_run(study, name) for name in names]
    for run in runs[1:]:
        same = run.manifest["corpus"]["fingerprint"] == runs[0].manifest["corpus"]["fingerprint"]
        if not same or run.vocab_size != runs[0].vocab_size:
            raise AnalysisError(
                f"the runs {runs[0].name} and {run.name} were recorded on different text; record "
                "both on the same corpus to compare them"
            )
    return runs


def read_json(path: Path) -> Any:
    """Read a JSON file of a study.

    Raises:
        AnalysisError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path} is damaged: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_claims(study: Path, command: str, claims: list[dict[str, Any]]) -> None:
    """Write one command's claims, and the study's claims of all commands."""
    write_json(study / command / "claims.json", claims)
    collected: list[dict[str, Any]] = []
    for name in COMMANDS:
        path = study / name / "claims.json"
        if path.exists():
            collected += read_json(path)
    write_json(study / "claims.json", collected)
