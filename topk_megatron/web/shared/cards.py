"""What is known of each neuron, as small lists that JSON and gzip pack well.

A card is an object; a part that was not measured is left out:

| key | value |
|---|---|
| examples | [[value, document, position, target, [token, …], [[index, value], …]], …] |
| tokens | [[token, count], …], its most frequent tokens |
| distinct | number of tokens that it fired on |
| concept | [[token, lift], …] |
| track | [[iteration, count, token entropy, similarity, example overlap], …] |
| steer | [[strength, control, success, damage, repetition], …] |
| samples | [[strength, prompt, unsteered, steered], …] |
| measured | {promoted: [[token, change of logit], …], suppressed: …}, where it was steered |
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import read_table

# Its functions are made at import, where a type checker does not see them.
compute: Any = pyarrow.compute

_TOKENS = 12
_SAMPLES = 12
_DIRECTION_TOKENS = 10
Card = dict[str, Any]


def short(value: float | None, digits: int = 4) -> float | None:
    """A number with so many significant digits; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


class CardReader:
    """Cards of one run, read a layer at a time.

    Args:
        study: the study directory.
        run: a finished run of it.
        examples: of each neuron, at most.

    Raises:
        AnalysisError: a table is missing or damaged.
    """

    def __init__(self, study: Path, run: Run, examples: int = 8) -> None:
        self.study, self.run, self.examples = study, run, examples
        run.tables.check("examples")

    def layer(self, layer: int) -> dict[int, Card]:
        """Cards of the neurons of one layer that have anything to show."""
        cards: dict[int, Card] = defaultdict(dict)
        self._add_examples(cards, layer)
        self._add_tokens(cards, layer)
        self._add_concepts(cards, layer)
        self._add_track(cards, layer)
        self._add_steering(cards, layer)
        return dict(cards)

    def _add_examples(self, cards: dict[int, Card], layer: int) -> None:
        path = self.run.directory / "examples.parquet"
        filters = [("layer", "=", layer), ("rank", "<", self.examples)]
        table = pq.read_table(path, filters=filters)
        context, values = table["context"].combine_chunks(), table["values"].combine_chunks()
        starts = context.offsets.to_numpy() - context.offsets[0].as_py()
        tokens, levels = context.flatten().to_numpy(), values.flatten().to_numpy()
        names = ("neuron", "value", "document", "position", "target")
        columns = [table[name].to_pylist() for name in names]
        for row, (neuron, value, document, position, target) in enumerate(
            zip(*columns, strict=True)
        ):
            part = slice(starts[row], starts[row + 1])
            window = levels[part]
            fired = [[int(i), short(float(window[i]), 3)] for i in np.nonzero(window)[0]]
            cards[neuron].setdefault("examples", []).append(
                [short(value), document, position, target, tokens[part].tolist(), fired]
            )

    def _add_tokens(self, cards: dict[int, Card], layer: int) -> None:
        histogram = self.run.histogram(layer)
        for neuron in np.nonzero(np.diff(histogram.starts))[0].tolist():
            tokens, counts, _ = histogram.of(neuron)
            order = np.argsort(-counts, kind="stable")[:_TOKENS]
            cards[neuron]["tokens"] = np.stack([tokens[order], counts[order]], 1).tolist()
            cards[neuron]["distinct"] = len(tokens)

    def _add_concepts(self, cards: dict[int, Card], layer: int) -> None:
        table = self._rows("entropy/neurons.parquet", layer, "concept_tokens", "concept_lifts")
        for row in table:
            if row["concept_tokens"]:
                lifts = [short(lift, 3) for lift in row["concept_lifts"]]
                pairs = zip(row["concept_tokens"], lifts, strict=True)
                cards[row["neuron"]]["concept"] = [list(pair) for pair in pairs]

    def _add_track(self, cards: dict[int, Card], layer: int) -> None:
        names = ("iteration", "count", "token_entropy", "similarity", "example_overlap")
        for row in self._rows("track/checkpoints.parquet", layer, *names, own=False):
            numbers = [row["iteration"], row["count"], *(short(row[name], 3) for name in names[2:])]
            cards[row["neuron"]].setdefault("track", []).append(numbers)

    def _add_steering(self, cards: dict[int, Card], layer: int) -> None:
        measures = ("success", "damage", "repetition")
        names = ("strength", "control", *measures)
        steered = set()
        for row in self._rows("steer/neurons.parquet", layer, *names):
            steered.add(row["neuron"])
            numbers = [short(row[name], 3) for name in measures]
            cards[row["neuron"]].setdefault("steer", []).append(
                [row["strength"], int(row["control"]), *numbers]
            )
        names = ("strength", "prompt", "unsteered", "steered")
        for row in self._rows("steer/samples.parquet", layer, *names, own=False):
            samples = cards[row["neuron"]].setdefault("samples", [])
            if row["neuron"] in steered and len(samples) < _SAMPLES:
                samples.append([row[name] for name in names])
        names = ("direction", "rank", "token", "change")
        for row in self._rows("steer/tokens.parquet", layer, *names, own=False):
            if row["neuron"] in steered and row["rank"] < _DIRECTION_TOKENS:
                measured = cards[row["neuron"]].setdefault("measured", {})
                pair = [row["token"], short(row["change"], 3)]
                measured.setdefault(row["direction"], []).append(pair)

    def _rows(self, name: str, layer: int, *columns: str, own: bool = True) -> list[dict[str, Any]]:
        """Rows of one layer of a result table, of this run if the table says of which they are."""
        path = self.study / name
        if not path.is_file():
            return []
        table = read_table(path, [*(("run",) if own else ()), "layer", "neuron", *columns])
        keep = compute.equal(table["layer"], layer)
        if own:
            keep = compute.and_(keep, compute.equal(table["run"], self.run.name))
        table = table.filter(keep)
        inside = compute.less(table["neuron"], pa.scalar(self.run.width, pa.int32()))
        return table.filter(inside).drop_columns(["layer"]).to_pylist()
