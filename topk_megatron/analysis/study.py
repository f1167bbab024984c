"""The study directory: where its files are, and the recorded runs in it, checked when read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from topk_megatron import files
from topk_megatron.analysis.histograms import Histogram
from topk_megatron.analysis.result import Result
from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.files import file_facts

# pyarrow makes these functions at import, where a type checker does not see them.
compute: Any = pyarrow.compute

FORMAT_VERSION = 1
_RUN_NAME = re.compile(r"[A-Za-z0-9._@-]+")

# Reads a JSON file of a study; a file that is missing or damaged raises AnalysisError.
read_json = partial(files.read_json, error=AnalysisError)


class RunTables(Mapping[str, pa.Table]):
    """The tables of a run by name, such as ``neurons`` or ``histograms/layer-003``.

    A table is read from its file when it is asked for, after the file was compared with the
    manifest.

    Args:
        directory: the run's folder.
        manifest: its manifest.json.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self._directory, self._manifest = directory, manifest

    def __getitem__(self, name: str) -> pa.Table:
        return read_table(self.check(name))

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".parquet") for name in self._manifest["files"])

    def __len__(self) -> int:
        return len(self._manifest["files"])

    def check(self, name: str) -> Path:
        """Compare a table's file with the size and SHA-256 in the manifest; return its path.

        Raises:
            AnalysisError: the file is missing, or is not the one that was written.
        """
        file = f"{name}.parquet"
        path, run = self._directory / file, self._manifest["run"]
        expected = self._manifest["files"].get(file)
        if expected is None:
            raise AnalysisError(f"the run {run} has no {file}; record it again")
        if not path.is_file() or file_facts(path) != expected:
            state = "damaged" if path.is_file() else "missing"
            raise AnalysisError(
                f"{path} is {state}: it is not the file that its manifest.json describes; record "
                f"the run again with --overwrite"
            )
        return path


@dataclass(frozen=True, kw_only=True)
class Run(Result):
    """A finished run: the result of `record`.

    It differs from the `Result` of the other commands in that its tables are in its folder
    already, because they were written while the model ran and may be larger than memory. They
    are read when asked for. Its parameters are the manifest, and it makes no claims.

    Attributes:
        directory: the run's folder.
    """

    directory: Path
    tables: RunTables

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return self.parameters

    @property
    def name(self) -> str:
        """The run's name in its study."""
        return self.manifest["run"]

    @property
    def kind(self) -> str:
        """``topk``, ``dense`` or ``sae``."""
        return self.manifest["kind"]

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers."""
        return tuple(self.manifest["layers"])

    @property
    def width(self) -> int:
        """Neurons per layer."""
        return self.manifest["width"]

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's vocabulary."""
        return self.manifest["model"]["vocab_size"]

    @cached_property
    def speed(self) -> dict[str, Any]:
        """The content of speed.json."""
        return read_json(self.directory / "speed.json")

    @cached_property
    def neurons(self) -> pa.Table:
        """The content of neurons.parquet."""
        return self.tables["neurons"]

    @cached_property
    def vocabulary(self) -> pa.Table:
        """The content of vocabulary.parquet."""
        return self.tables["vocabulary"]

    @cached_property
    def examples(self) -> pa.Table:
        """The content of examples.parquet."""
        return self.tables["examples"]

    def histogram(self, layer: int) -> Histogram:
        """Return the token histograms of one layer."""
        self.check_layer(layer)
        table = self.tables[f"histograms/layer-{layer:03d}"]
        neurons, tokens, counts, mass = (column.to_numpy() for column in table.columns)
        starts = np.searchsorted(neurons, np.arange(self.width + 1))
        return Histogram(self.width, self.vocab_size, starts, tokens, counts, mass)

    def activations(
        self,
        layer: int,
        *,
        neurons: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> pa.Table:
        """Return single activations, of a run that was recorded with ``--activations``.

        Only the blocks that hold the positions are read, one at a time, and of those only the
        layer, so that memory holds the result and one block.

        Args:
            layer: a recorded layer.
            neurons: the neurons to keep; None keeps all.
            positions: the positions in the corpus to keep, such as ``range(1000, 2000)``; None
                keeps all.

        Returns:
            The rows of activations/ in their order: sorted by position, then by neuron.

        Raises:
            AnalysisError: the run holds no activations, a file is missing or damaged, or the layer,
                a neuron or a position is out of range.
        """
        self.check_layer(layer)
        if not self.manifest["raw"]:
            raise AnalysisError(
                f"the run {self.name} holds no single activations; record it again with "
                "--activations --overwrite"
            )
        wanted, blocks = compute.field("layer") == layer, range(self.manifest["blocks"])
        if neurons is not None:
            for neuron in neurons:
                self.check_neuron(neuron)
            wanted &= compute.field("neuron").isin(pa.array(neurons, pa.int32()))
        if positions is not None:
            places = self._places(positions)
            wanted &= compute.field("position").isin(pa.array(places))
            blocks = np.unique(places // self.manifest["block_tokens"]).tolist() or [0]
        paths = (self.tables.check(f"activations/block-{block:06d}") for block in blocks)
        return pa.concat_tables([read_table(path, filters=wanted) for path in paths])

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

    def _places(self, positions: Sequence[int]) -> np.ndarray:
        """Return positions as int64; refuse those that the corpus does not have."""
        places, last = np.asarray(positions, np.int64), self.manifest["corpus"]["tokens"] - 1
        outside = places[(places < 0) | (places > last)]
        if len(outside):
            raise AnalysisError(
                f"position {outside[0]} is out of range; the run {self.name} has positions 0 to "
                f"{last}"
            )
        return places


def check_run_name(name: str) -> None:
    """Refuse a name that would not be one folder."""
    if not _RUN_NAME.fullmatch(name) or name.startswith("."):
        raise AnalysisError(
            f"a run is named with letters, digits, '.', '_', '-' and '@', got {name!r}"
        )


def run_directory(study: Path, name: str) -> Path:
    """Return the folder of a run."""
    check_run_name(name)
    return study / "runs" / name


def open_run(study: Path, name: str) -> Run:
    """Open a finished run of a study.

    Raises:
        AnalysisError: no run has this name, or it is unfinished or of another format.
    """
    directory = run_directory(study, name)
    path = directory / "manifest.json"
    if not path.is_file():
        if directory.is_dir():
            raise AnalysisError(f"the run {name} is unfinished; repeat its record command")
        known = ", ".join(list_runs(study)) or "none"
        raise AnalysisError(f"{study} has no run {name!r}; recorded are: {known}")
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise AnalysisError(
            f"{path} has format version {manifest.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; record the run again"
        )
    tables = RunTables(directory, manifest)
    return Run(directory=directory, tables=tables, claims=[], parameters=manifest)


def list_runs(study: Path) -> list[str]:
    """Return the names of the finished runs of a study."""
    return sorted(path.parent.name for path in (study / "runs").glob("*/manifest.json"))


def open_runs(study: Path, names: list[str]) -> list[Run]:
    """Open runs to compare.

    Raises:
        AnalysisError: a run is missing, or the runs were recorded on different text.
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
