"""Invents studies of any size, with every table that a report reads, for tests and benchmarks."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.measures import Interval
from topk_megatron.analysis.record import merge
from topk_megatron.analysis.result import Claim, Result, claim, row, write_result
from topk_megatron.analysis.tables import ALL_LAYERS, write_table
from topk_megatron.files import file_facts, write_json

# Tokens that would be markup, a line break, a quotation, nothing, and a byte.
ODD = ["<script>window.hacked=1</script>", "</script>", "\n", ' "quoted"', "", "<0x0A>", "&amp;"]
ITERATIONS = (100, 200, 300, 400)
STRENGTHS = (0.0, 1.0, 2.0)


class Invention:
    """Writes a study of random numbers; the same seed gives the same study.

    Args:
        study: the directory to write.
        layers: number of recorded layers.
        width: neurons per layer.
        vocab: number of tokens.
        model: the model folder that the manifest names.
        examples: examples per neuron, each a window of 25 tokens.
        run: name of the run.
    """

    def __init__(
        self, study: Path, layers: int = 2, width: int = 96, vocab: int = 200, *,
        model: Path = Path("gone"), examples: int = 8, run: str = "topk",
    ) -> None:  # fmt: skip
        self.study, self.layers, self.width, self.vocab = study, layers, width, vocab
        self.model, self.examples, self.run = model, examples, run
        self.rng = np.random.default_rng(0)
        size = layers * width
        self.layer = np.repeat(np.arange(layers, dtype=np.int16), width)
        self.neuron = np.tile(np.arange(width, dtype=np.int32), layers)
        self.counts = self.rng.integers(1, 5000, size)
        self.counts[-1] = 0  # the last neuron never fires
        self.texts = [f" word{number}" for number in range(vocab)]
        self.texts[: len(ODD)] = ODD

    def record(self) -> "Invention":
        """Writes runs/RUN."""
        directory = self.study / "runs" / self.run
        write_table(directory / "neurons.parquet", self._neurons())
        numbers = np.arange(self.vocab, dtype=np.int32)
        columns = {"token": numbers, "text": self.texts, "count": numbers.astype(np.int64)}
        write_table(directory / "vocabulary.parquet", pa.table(columns, schema=merge.VOCABULARY))
        write_table(directory / "examples.parquet", self._examples())
        for layer in range(self.layers):
            path = directory / "histograms" / f"layer-{layer:03d}.parquet"
            write_table(path, self._histogram(layer))
        files = {
            str(path.relative_to(directory)): file_facts(path)
            for path in sorted(directory.rglob("*.parquet"))
        }
        write_json(directory / "manifest.json", self._manifest(files))
        return self

    def _neurons(self) -> pa.Table:
        fired = self.counts > 0
        top = self.rng.gamma(2.0, 2.0, len(fired))
        columns = {
            "layer": self.layer, "neuron": self.neuron, "count": self.counts,
            "mass": self.counts * top / 2, "sum": self.counts * top / 2, "sum_squares": top,
            "max": pa.array(top.astype(np.float32), mask=~fired),
            "min": pa.array(np.zeros(len(fired), np.float32), mask=~fired),
        }  # fmt: skip
        return pa.table(columns, schema=merge.NEURONS)

    def _examples(self) -> pa.Table:
        neurons = np.nonzero(self.counts)[0]
        rows, window = len(neurons) * self.examples, 25
        tokens = self.rng.integers(0, self.vocab, (rows, window)).astype(np.int32)
        tokens[:, 16] = np.repeat(neurons % self.vocab, self.examples)
        values = np.where(self.rng.random((rows, window)) < 0.05, 1.5, 0).astype(np.float32)
        rank = np.tile(np.arange(self.examples, dtype=np.int16), len(neurons))
        values[:, 16] = 9 - rank
        offsets = np.arange(0, rows * window + 1, window, dtype=np.int32)
        columns = {
            "layer": np.repeat(self.layer[neurons], self.examples),
            "neuron": np.repeat(self.neuron[neurons], self.examples),
            "rank": rank, "value": values[:, 16],
            "position": self.rng.integers(0, 10**6, rows), "document": np.zeros(rows, np.int32),
            "token": tokens[:, 16], "context": pa.ListArray.from_arrays(offsets, tokens.ravel()),
            "target": np.full(rows, 16, np.int16),
            "values": pa.ListArray.from_arrays(offsets, values.ravel()),
        }  # fmt: skip
        return pa.table(columns).cast(merge.EXAMPLES)

    def _histogram(self, layer: int) -> pa.Table:
        """Each neuron fires mostly on the token of its own number, and on 20 others."""
        counts = self.counts[layer * self.width : (layer + 1) * self.width]
        neurons = np.nonzero(counts)[0]
        tokens = (neurons[:, None] + np.arange(20) * 3) % self.vocab
        shares = np.maximum(1, counts[neurons, None] // 2 ** np.arange(1, 21))
        order = np.argsort(tokens, axis=1)
        tokens, shares = (np.take_along_axis(one, order, 1) for one in (tokens, shares))
        columns = {
            "neuron": np.repeat(neurons, 20).astype(np.int32),
            "token": tokens.ravel().astype(np.int32),
            "count": shares.ravel().astype(np.int64),
            "mass": shares.ravel().astype(float),
        }
        return pa.table(columns, schema=merge.HISTOGRAM)

    def _manifest(self, files: dict[str, Any]) -> dict[str, Any]:
        return {
            "format_version": 1, "run": self.run, "kind": "topk", "sae": None,
            "model": {
                "path": str(self.model), "fingerprint": "0" * 64, "num_layers": self.layers + 2,
                "hidden_size": self.width, "vocab_size": self.vocab, "iteration": ITERATIONS[-1],
                "tokens_seen": 10**6,
            },
            "layers": list(range(self.layers)), "width": self.width, "k": 8, "mode": "value",
            "corpus": {
                "path": "corpus", "kind": "text", "tokens": 10**6, "documents": 3,
                "seq_length": 256, "fingerprint": "1" * 64,
            },
            "top_n": self.examples, "context_before": 16, "context_after": 8,
            "block_tokens": 16384, "blocks": 62, "raw": False, "files": files,
        }  # fmt: skip

    def entropy(self, semantic: bool = True) -> "Invention":
        """Writes entropy/."""
        size = len(self.counts)
        entropies = self.rng.gamma(3.0, 1.2, size)
        columns: dict[str, Any] = {
            "run": [self.run] * size, "kind": ["topk"] * size, "layer": self.layer,
            "neuron": self.neuron, "count": self.counts, "token_entropy": entropies,
        }  # fmt: skip
        for name in ("token_entropy_plugin", "token_entropy_mass", "token_entropy_top"):
            columns[name] = entropies * 0.9
        silent = np.full(size, not semantic)
        columns["semantic_entropy"] = pa.array(entropies / 2, mask=silent)
        columns["semantic_clusters"] = pa.array(self.neuron % 9, mask=silent)
        concepts = (self.neuron[:, None] + np.arange(5)) % self.vocab
        columns["concept_tokens"] = pa.array(concepts.tolist(), pa.list_(pa.int32()))
        columns["concept_lifts"] = pa.array([[50.0, 20.0, 9.0, 4.0, 2.0]] * size)
        summary = pa.Table.from_pylist(self._entropy_summary())
        rows = [row("topk", Interval(3.1, 3.0, 3.2, size)), row("dense", Interval(5, 4.9, 5.1, 9))]
        gap = ("topk - dense", Interval(-1.9, -2.1, -1.7, size))
        sentence = "TopK neurons are more specialised than those of <b>the dense twin</b>"
        claims = [
            claim("entropy", "entropy", sentence, "token entropy", "bits", rows, difference=gap)
        ]
        refused = None if semantic else "no embedding model is installed"
        parameters = {"runs": [self.run], "semantic_refused": refused}
        tables = {"neurons": pa.table(columns), "summary": summary}
        return self._write("entropy", tables, parameters, claims)

    def _write(
        self,
        command: str,
        tables: dict[str, pa.Table],
        parameters: dict[str, Any],
        claims: list[Claim] | None = None,
    ) -> "Invention":
        result = Result(tables=tables, claims=claims or [], parameters=parameters)
        write_result(self.study, command, result)
        return self

    def _entropy_summary(self) -> list[dict[str, Any]]:
        spread = {"resampled": "neurons", "p10": 1.0, "p50": 3.0, "p90": 6.0, "neurons": self.width}
        levels = {"topk": ("topk", 3.1), "topk:shuffled": ("shuffled", 7.4), "dense": ("dense", 5)}
        places = itertools.product(
            (ALL_LAYERS, *range(self.layers)), ("token_entropy", "semantic_entropy")
        )
        return [
            {"run": run, "kind": kind, "layer": layer, "measure": measure}
            | interval(level + layer / 10)
            | spread
            for layer, measure in places
            for run, (kind, level) in levels.items()
        ]

    def track(self) -> "Invention":
        """Writes track/."""
        size = len(self.counts)
        parts = []
        for number, iteration in enumerate(ITERATIONS):
            similarity = (number + 1 + self.rng.random(size)) / (len(ITERATIONS) + 1)
            columns = {
                "run": [f"{self.run}@iter_{iteration:07d}"] * size,
                "iteration": np.full(size, iteration), "layer": self.layer, "neuron": self.neuron,
                "count": self.counts, "token_entropy": 6 - 4 * similarity,
                "similarity": similarity, "example_overlap": similarity**2,
            }  # fmt: skip
            parts.append(pa.table(columns))
        drift = self.rng.random(size)
        when = pa.array(np.full(size, 200), mask=drift > 0.5)
        columns = {
            "layer": self.layer, "neuron": self.neuron, "specialised_iteration": when,
            "formed_iteration": when, "drift": drift, "late_drift": drift / 2,
        }  # fmt: skip
        levels = {
            "similarity": 0.2, "other_similarity": 0.02, "specialised": 0.1, "token_entropy": 1.0,
        }  # fmt: skip
        rows = [
            {"iteration": iteration, "layer": ALL_LAYERS, "measure": measure, "neurons": size}
            | interval(level * (number + 1))
            for number, iteration in enumerate(ITERATIONS)
            for measure, level in levels.items()
        ]
        tables = {
            "checkpoints": pa.concat_tables(parts),
            "neurons": pa.table(columns),
            "summary": pa.Table.from_pylist(rows),
        }
        return self._write("track", tables, {"runs": []})

    def steer(self, neurons: int = 4) -> "Invention":
        """Writes steer/, for the first neurons of layer 0."""
        pushed = [{"layer": 0, "neuron": n} for n in range(neurons)]
        grid = list(itertools.product(STRENGTHS, (False, True)))
        rows = [
            one | {"run": self.run, "strength": s, "control": c, "damage": s / 3, "repetition": 0.1}
            | {"success": 0.0 if c else s / 10 + one["neuron"] / 100}
            for one in pushed for s, c in grid
        ]  # fmt: skip
        texts = {"prompt": "To be", "unsteered": " or not <i>to</i> be", "steered": " king king"}
        samples = [
            one | {"strength": s, "sample": 0} | texts for one in pushed for s in STRENGTHS
        ]  # fmt: skip
        signs = {"promoted": 1, "suppressed": -1}
        tokens = [
            one | {"direction": direction, "rank": r, "token": 9 + r, "change": sign * (5.0 - r)}
            for one in pushed for direction, sign in signs.items() for r in range(3)
        ]  # fmt: skip
        summary = [
            {"layer": ALL_LAYERS, "strength": s, "control": c, "measure": measure}
            | {"neurons": neurons} | interval(0.01 if c else s / 10)
            for s, c in grid for measure in ("success", "damage")
        ]  # fmt: skip
        found = {"neurons": rows, "samples": samples, "tokens": tokens, "summary": summary}
        tables = {name: pa.Table.from_pylist(one) for name, one in found.items()}
        return self._write("steer", tables, {"run": self.run})


def interval(level: float) -> dict[str, float]:
    """Returns the columns of a mean and its interval."""
    return {"mean": level, "low": level * 0.95, "high": level * 1.05}
