"""The result of `steer`: tables of neurons, samples, tokens and means, and claims."""

from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.corpus import Corpus, join_tokens
from topk_megatron.analysis.measures import mean_interval
from topk_megatron.analysis.result import Claim, Result, claim, row
from topk_megatron.analysis.steer.run import LISTED, SteerConfig, Steered, measure, push_all
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import (
    ALL_LAYERS,
    INTERVAL,
    interval_columns,
    percentile_columns,
)
from topk_megatron.hf.model import OpenModel

_NEURONS = pa.schema(
    [
        ("run", pa.string()),
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("steered_neuron", pa.int32()),
        ("control", pa.bool_()),
        ("strength", pa.float64()),
        ("unit", pa.float64()),
        ("samples", pa.int32()),
        ("tokens", pa.int32()),
        *(
            (name, pa.float64())
            for name in (
                "concept_rate",
                "base_rate",
                "success",
                "promoted_rate",
                "promoted_base_rate",
                "perplexity",
                "base_perplexity",
                "damage",
                "repetition",
                "base_repetition",
            )
        ),
    ]
)
_SAMPLES = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("strength", pa.float64()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("unsteered", pa.string()),
        ("steered", pa.string()),
    ]
)
_TOKENS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("direction", pa.string()),
        ("rank", pa.int16()),
        ("token", pa.int32()),
        ("change", pa.float64()),
    ]
)
_PERCENTILES = (10, 50, 90)
_SUMMARY = pa.schema(
    [
        ("layer", pa.int16()),
        ("strength", pa.float64()),
        ("control", pa.bool_()),
        ("measure", pa.string()),
        *INTERVAL,
        *((f"p{p}", pa.float64()) for p in _PERCENTILES),
    ]
)
_MEASURES = ("success", "promoted_success", "damage", "repetition")


def steer(config: SteerConfig, folder: OpenModel, run: Run, corpus: Corpus) -> Result:
    """Push neurons while the model writes.

    Args:
        config: what to push, and how far.
        folder: the model.
        run: a recording of it.
        corpus: the text that prompts are taken from.

    Returns:
        The tables neurons, samples, tokens and summary.

    Raises:
        AnalysisError: as `push_all` says.
    """
    steered = push_all(config, folder, run, corpus)
    rows = _neuron_rows(run, steered)
    found = {
        "neurons": (rows, _NEURONS),
        "samples": (_sample_rows(run, steered), _SAMPLES),
        "tokens": (_token_rows(steered), _TOKENS),
        "summary": (_summary(config, rows), _SUMMARY),
    }
    parameters = {
        "run": run.name,
        "neurons": [[s.layer, s.neuron] for s in steered.subjects],
        "strengths": list(config.strengths),
        "samples": config.samples,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "temperature": config.temperature,
        "prompts": steered.prompts.tolist(),
        "min_count": config.min_count,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "model": str(folder.path),
    }
    tables = {name: pa.Table.from_pylist(*pair) for name, pair in found.items()}
    return Result(tables=tables, claims=_claims(config, rows), parameters=parameters)


def _neuron_rows(run: Run, steered: Steered) -> list[dict[str, Any]]:
    rows = []
    for trial in steered.trials:
        subject = steered.subjects[trial.subject]
        rows.append(
            {
                "run": run.name,
                "layer": subject.layer,
                "neuron": subject.neuron,
                "steered_neuron": subject.control if trial.control else subject.neuron,
                "control": trial.control,
                **measure(subject, trial, steered.base),
            }
        )
    return rows


def _sample_rows(run: Run, steered: Steered) -> list[dict[str, Any]]:
    vocabulary = run.vocabulary["text"].to_pylist()

    def text(tokens: Any) -> str:
        return join_tokens([vocabulary[token] for token in tokens.tolist()])

    prompts = [text(row) for row in steered.prompts]
    unsteered = [text(row) for row in steered.base.tokens]
    rows = []
    for trial in steered.trials:
        if trial.control:
            continue
        subject = steered.subjects[trial.subject]
        rows += [
            {
                "layer": subject.layer,
                "neuron": subject.neuron,
                "strength": trial.strength,
                "sample": number,
                "prompt": prompts[number],
                "unsteered": unsteered[number],
                "steered": text(tokens),
            }
            for number, tokens in enumerate(trial.tokens)
        ]
    return rows


def _token_rows(steered: Steered) -> list[dict[str, Any]]:
    rows = []
    for subject, change in zip(steered.subjects, steered.changes, strict=True):
        for direction, largest in (("promoted", True), ("suppressed", False)):
            found = change.topk(min(LISTED, len(change)), largest=largest)
            rows += [
                {
                    "layer": subject.layer,
                    "neuron": subject.neuron,
                    "direction": direction,
                    "rank": rank,
                    "token": token,
                    "change": value,
                }
                for rank, (value, token) in enumerate(
                    zip(found.values.tolist(), found.indices.tolist(), strict=True)
                )
            ]
    return rows


def _value(row: dict[str, Any], name: str) -> float:
    """Return a measure of one push; for repetition it is the increase."""
    if name == "promoted_success":
        return row["promoted_rate"] - row["promoted_base_rate"]
    if name == "repetition":
        return row["repetition"] - row["base_repetition"]
    return row[name]


def _summary(config: SteerConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, float, bool, str], list[float]] = {}
    for entry in rows:
        for layer in (entry["layer"], ALL_LAYERS):
            for name in _MEASURES:
                key = (layer, entry["strength"], entry["control"], name)
                groups.setdefault(key, []).append(_value(entry, name))
    found = []
    for (layer, strength, control, name), numbers in groups.items():
        values = np.array(numbers)
        interval = mean_interval(values, resamples=config.bootstrap, seed=config.seed)
        assert interval is not None
        found.append(
            {
                "layer": layer,
                "strength": strength,
                "control": control,
                "measure": name,
                **interval_columns(interval),
                **percentile_columns(values, _PERCENTILES),
            }
        )
    return found


def _claims(config: SteerConfig, rows: list[dict[str, Any]]) -> list[Claim]:
    return [_claim(config, rows, strength) for strength in config.strengths]


def _claim(config: SteerConfig, rows: list[dict[str, Any]], strength: float) -> Claim:
    options = {"resamples": config.bootstrap, "seed": config.seed}

    def values(control: bool, name: str = "success") -> np.ndarray:
        chosen = [r for r in rows if r["control"] is control and r["strength"] == strength]
        return np.array([_value(entry, name) for entry in chosen])

    own, control = values(False), values(True)
    damage = mean_interval(values(False, "damage"), **options)
    assert damage is not None
    return claim(
        "steer",
        f"steer-{strength:g}",
        f"Pushing a neuron by {strength:g} times its largest value brings its concept tokens, more "
        "than pushing another of equal activity does",
        "increase of the share of concept tokens",
        "share of tokens",
        [
            row("its own neuron", mean_interval(own, **options)),
            row("control", mean_interval(control, **options)),
        ],
        difference=("own - control", mean_interval(own - control, **options)),
        holds_if="above",
        note=f"damage: {damage.value:.2f} bits a token under the unsteered model "
        f"({damage.low:.2f} to {damage.high:.2f}); intervals by bootstrap over neurons",
    )
