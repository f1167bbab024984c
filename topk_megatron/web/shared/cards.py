"""Reads what a study knows of each neuron: its card.

The report writes the cards of all neurons, the explorer shows one at a time. A card is an object
of short lists, which JSON and gzip pack well; a part that was not measured is left out:

| key | value |
|---|---|
| examples | [[value, document, position, target, [token, …], [[index, value], …]], …] |
| tokens | [[token, count], …], its most frequent tokens |
| distinct | number of tokens on which it fired |
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

from topk_megatron.analysis.result import COMMANDS
from topk_megatron.analysis.study import Run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.web.shared.neuron_measures import collect_measures

# pyarrow makes its functions at import, where a type checker does not see them.
compute: Any = pyarrow.compute

_TOKENS = 12
_SAMPLES = 12
_DIRECTION_TOKENS = 10
_LAYERS_HELD = 2
Card = dict[str, Any]


def short(value: float | None, digits: int = 4) -> float | None:
    """Returns a number rounded to so many significant digits; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def tokens_of(card: Card) -> set[int]:
    """Returns every token that a card names."""
    found = {token for example in card.get("examples", []) for token in example[4]}
    pairs = card.get("tokens", []) + card.get("concept", [])
    for side in card.get("measured", {}).values():
        pairs = pairs + side
    return found | {token for token, _ in pairs}


def leading_tokens(card: Card, limit: int) -> list[int]:
    """Returns the tokens that describe a neuron in a list: its concept's, then its most frequent.

    Args:
        card: the neuron's card.
        limit: at most this many tokens, of which at most half are the concept's.
    """
    concept = [token for token, _ in card.get("concept", [])][: limit // 2]
    frequent = [token for token, _ in card.get("tokens", [])]
    return list(dict.fromkeys([*concept, *frequent]))[:limit]


def missing_parts(study: Path, run: Run) -> dict[str, str]:
    """Returns the reason for every part that the study lacks, as a sentence for the reader."""
    missing = {}
    for command in COMMANDS:
        if not (study / command / "parameters.json").is_file():
            missing[command] = (
                f"Not measured: tools/analyze.py {command} was not run on this study."
            )
    entropy = study / "entropy" / "parameters.json"
    refused = read_json(entropy).get("semantic_refused") if entropy.is_file() else None
    if refused:
        missing["semantic"] = f"Semantic entropy was left out: {refused}."
    steer = study / "steer" / "parameters.json"
    if steer.is_file() and read_json(steer).get("run") not in (run.name, None):
        other = read_json(steer)["run"]
        missing["steer"] = f"Steering was measured on the run {other}, not on {run.name}."
    return missing


class CardReader:
    """Reads the cards of one run, a layer at a time.

    Args:
        study: the study directory.
        run: a finished run in it.
        examples: the largest number of examples on a card.

    Attributes:
        measures: the numbers of every neuron.
        missing: for every part that the study lacks, the reason as a sentence.

    Raises:
        AnalysisError: a table is missing or damaged.
    """

    def __init__(self, study: Path, run: Run, examples: int = 8) -> None:
        self.study, self.run, self.examples = study, run, examples
        self.measures = collect_measures(study, run)
        self.missing = missing_parts(study, run)
        self._held: dict[int, dict[int, Card]] = {}
        run.tables.check("examples")

    def card(self, layer: int, neuron: int) -> Card | None:
        """Returns the card of one neuron; None if its layer was not recorded.

        The cards of the last layers are held, so that the next neuron of a layer is there at once.
        """
        if layer not in self.run.layers:
            return None
        cards = self._held.get(layer)
        if cards is None:
            cards = self.layer(layer)
            while len(self._held) >= _LAYERS_HELD:
                self._held.pop(next(iter(self._held)), None)
            self._held[layer] = cards
        return cards.get(neuron, {})

    def measured(self, layer: int, neuron: int) -> list[dict[str, Any]]:
        """Returns the neuron's measures with their values; none if its layer was not recorded."""
        if layer not in self.run.layers:
            return []
        place = self.run.layers.index(layer)
        return [one.describe() | {"value": one.of(place, neuron)} for one in self.measures]

    def layer(self, layer: int) -> dict[int, Card]:
        """Returns the cards of a layer's neurons; one that has nothing to show is left out."""
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
        """Returns one layer's rows of a result table, none if it was not written.

        Args:
            name: the table's path in the study.
            layer: the layer.
            *columns: the columns to return, besides the neuron.
            own: the table names its runs; only rows of this one are returned.
        """
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
