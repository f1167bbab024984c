"""Puts a report together and writes it."""

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
from topk_megatron.web.report.first_view import choose_run, summarise
from topk_megatron.web.report.offline_page import block, write_page
from topk_megatron.web.shared.cards import CardReader, leading_tokens, short

CHUNK = 64
_LIST_TOKENS = 6
_DIRECTION_TOKENS = 8


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report.

    Attributes:
        study: the study directory.
        output: the HTML file.
        run: the run whose neurons get cards; None chooses the study's subject.
        examples: the largest number of examples per neuron.
        model: exported folder from which promoted tokens are computed; None takes the folder from
            which the run was recorded.
    """

    study: Path
    output: Path
    run: str | None = None
    examples: int = 8
    model: Path | None = None


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Writes the HTML file.

    Returns:
        The content of the report's first view.

    Raises:
        AnalysisError: the study has no finished run, or one of its tables is damaged.
    """
    if not config.study.is_dir():
        raise AnalysisError(
            f"{config.study} is not a study directory; give the directory that "
            "tools/analyze.py record wrote to"
        )
    if config.output.is_dir():
        raise AnalysisError(f"{config.output} is a directory; give the name of an HTML file")
    run = choose_run(config.study, config.run)
    reader = CardReader(config.study, run, config.examples)
    summary = summarise(reader)
    try:
        directions = _directions(config, run)
    except UserError as error:
        directions = None
        summary["missing"]["promoted"] = f"Not computed: {error}."
    top = np.full((len(run.layers), run.width, _LIST_TOKENS), -1, np.int32)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as cards:
        cards.writelines(_cards(reader, top))
        cards.seek(0)
        first = [block("summary", {**summary, "chunk": CHUNK, "listTokens": _LIST_TOKENS})]
        first += [block(f"measure-{one.key}", one.values) for one in reader.measures]
        first += [block("vocabulary", run.vocabulary["text"].to_pylist()), block("tops", top)]
        first += [] if directions is None else [block("directions", directions)]
        write_page(config.output, f"{run.name}: what its neurons mean", first, cards)
    return summary


def _cards(reader: CardReader, top: np.ndarray) -> Iterator[str]:
    """Yields blocks of cards layer by layer, and fills `top` [L, N, tokens] on the way."""
    run = reader.run
    for place, layer in enumerate(run.layers):
        cards = reader.layer(layer)
        for neuron, card in cards.items():
            tokens = leading_tokens(card, _LIST_TOKENS)
            top[place, neuron, : len(tokens)] = tokens
        for start in range(0, run.width, CHUNK):
            stop = min(start + CHUNK, run.width)
            chunk = [cards.get(neuron) for neuron in range(start, stop)]
            yield block(f"cards-{place}-{start // CHUNK}", chunk)


def _directions(config: ReportConfig, run: Run) -> list[list[Any]]:
    """Returns the [promoted, suppressed] tokens of every neuron.

    Raises:
        UserError: the run's neurons are not coordinates of the hidden state, or its model cannot be
            found.
    """
    if run.kind == "sae":
        raise AnalysisError("latents of an SAE are not coordinates of the hidden state")
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
