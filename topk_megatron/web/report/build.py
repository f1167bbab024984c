"""Puts a report together."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.analysis.promoted import read_directions
from topk_megatron.analysis.study import Run
from topk_megatron.errors import AnalysisError, UserError
from topk_megatron.hf.model import open_model
from topk_megatron.web.report.measures import collect_measures
from topk_megatron.web.report.page import block, write_page
from topk_megatron.web.report.summary import choose_run, summarise
from topk_megatron.web.shared.cards import Card, CardReader, short

CHUNK = 64
_LIST_TOKENS = 6
_DIRECTION_TOKENS = 8


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report.

    Attributes:
        study: the study directory.
        output: the HTML file.
        run: whose neurons get cards; None chooses the study's subject.
        examples: of each neuron, at most.
        model: folder for promoted tokens; None is the one that the run was recorded from.
    """

    study: Path
    output: Path
    run: str | None = None
    examples: int = 8
    model: Path | None = None


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the HTML file.

    Returns:
        What it shows: the content of its first view.

    Raises:
        AnalysisError: the study has no finished run, or a table of it is damaged.
    """
    if not config.study.is_dir():
        raise AnalysisError(f"{config.study} is no study directory")
    if config.output.is_dir():
        raise AnalysisError(f"{config.output} is a directory; give the name of an HTML file")
    run = choose_run(config.study, config.run)
    measures = collect_measures(config.study, run)
    summary = summarise(config.study, run, measures)
    try:
        directions = _directions(config, run)
    except UserError as error:
        directions = None
        summary["missing"]["promoted"] = f"Not computed: {error}."
    top = np.full((len(run.layers), run.width, _LIST_TOKENS), -1, np.int32)
    reader = CardReader(config.study, run, config.examples)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as cards:
        cards.writelines(_cards(run, reader, top))
        cards.seek(0)
        first = [block("summary", {**summary, "chunk": CHUNK, "listTokens": _LIST_TOKENS})]
        first += [block(f"measure-{one.key}", one.values) for one in measures]
        first += [block("vocabulary", run.vocabulary["text"].to_pylist()), block("tops", top)]
        first += [] if directions is None else [block("directions", directions)]
        write_page(config.output, f"{run.name}: what its neurons mean", first, cards)
    return summary


def _cards(run: Run, reader: CardReader, top: np.ndarray) -> Iterator[str]:
    """Blocks of cards, layer by layer; fills `top` [L, N, tokens] on the way."""
    for place, layer in enumerate(run.layers):
        cards = reader.layer(layer)
        for neuron, card in cards.items():
            tokens = list_tokens(card)
            top[place, neuron, : len(tokens)] = tokens
        for start in range(0, run.width, CHUNK):
            stop = min(start + CHUNK, run.width)
            chunk = [cards.get(neuron) for neuron in range(start, stop)]
            yield block(f"cards-{place}-{start // CHUNK}", chunk)


def list_tokens(card: Card) -> list[int]:
    """The tokens that stand for a neuron in the list: its concept's, then its most frequent."""
    concept = [token for token, _ in card.get("concept", [])][: _LIST_TOKENS // 2]
    frequent = [token for token, _ in card.get("tokens", [])]
    return list(dict.fromkeys([*concept, *frequent]))[:_LIST_TOKENS]


def _directions(config: ReportConfig, run: Run) -> list[list[Any]]:
    """[promoted, suppressed] tokens of every neuron.

    Raises:
        UserError: the run's neurons are no coordinates of the hidden state, or its model is gone.
    """
    if run.kind == "sae":
        raise AnalysisError("latents of a SAE are not coordinates of the hidden state")
    path = config.model or Path(run.manifest["model"]["path"])
    folder = open_model(path)
    if folder.hidden_size != run.width or folder.vocab_size != run.vocab_size:
        raise AnalysisError(
            f"the model in {path.name} has {folder.hidden_size} neurons and "
            f"{folder.vocab_size} tokens, the run {run.width} and {run.vocab_size}"
        )
    directions = read_directions(path, folder.config)
    found: list[list[Any]] = [[], []]
    for start in range(0, run.width, 256):
        stop = min(start + 256, run.width)
        for side, rows in zip(found, directions.top(start, stop, _DIRECTION_TOKENS), strict=True):
            side += [[[token, short(value, 3)] for token, value in row] for row in rows]
    return found
