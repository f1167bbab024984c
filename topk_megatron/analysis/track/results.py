"""The result of `track`: tables of checkpoints, neurons, layers and means, and claims."""

from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.entropy.semantic import Embed
from topk_megatron.analysis.measures import mean_interval
from topk_megatron.analysis.result import Claim, Result, claim, row
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import ALL_LAYERS, INTERVAL, interval_columns, nullable
from topk_megatron.analysis.track.revisions import Revision
from topk_megatron.analysis.track.run import (
    Columns,
    TrackConfig,
    corpus_entropy,
    track_layer,
    track_layers,
)

_MEASURES = (
    "similarity",
    "other_similarity",
    "example_overlap",
    "context_similarity",
    "same_index",
    "specialised",
    "token_entropy",
)


_SUMMARY = pa.schema(
    [
        ("iteration", pa.int64()),
        ("layer", pa.int16()),
        ("measure", pa.string()),
        *INTERVAL,
    ]
)


def track(
    config: TrackConfig,
    revisions: list[Revision],
    runs: list[Run],
    embed: Embed | None,
    facts: dict[str, Any],
) -> Result:
    """Follow all layers.

    Args:
        config: what counts as specialised and as formed.
        revisions: the checkpoints in the order of training.
        runs: their recordings, in the same order.
        embed: from texts to unit vectors; None leaves context similarities out.
        facts: further entries of the parameters.

    Returns:
        The tables checkpoints, neurons, layers and summary.
    """
    found: dict[int, list[Columns]] = {}
    checkpoints, neurons = [], []
    for layer in runs[0].layers:
        found[layer], formation = track_layer(config, runs, layer, embed)
        for revision, run, columns in zip(revisions, runs, found[layer], strict=True):
            columns["same_index"] = (columns["best_match"] == np.arange(run.width)).astype(float)
            checkpoints.append(_checkpoint_table(revision, run, layer, columns))
        neurons.append(_neuron_table(revisions, layer, formation))
    layers = track_layers(runs[-1], config.seed)
    summary = _summary(config, revisions, found)
    return Result(
        tables={
            "checkpoints": pa.concat_tables(checkpoints),
            "neurons": pa.concat_tables(neurons),
            "layers": layers,
            "summary": pa.Table.from_pylist(summary, _SUMMARY),
        },
        claims=_claims(config, revisions, found, layers),
        parameters=_parameters(config, revisions, runs) | facts,
    )


def _parameters(config: TrackConfig, revisions: list[Revision], runs: list[Run]) -> dict[str, Any]:
    return {
        "runs": [run.name for run in runs],
        "iterations": [revision.iteration for revision in revisions],
        "min_count": config.min_count,
        "specialised_bits": config.specialised_bits,
        "formed_similarity": config.formed_similarity,
        "corpus_entropy": corpus_entropy(runs[-1]),
        "context_neurons": config.context_neurons,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
    }


def _checkpoint_table(revision: Revision, run: Run, layer: int, columns: Columns) -> pa.Table:
    size = run.width
    match = columns["best_match"]
    return pa.table(
        {
            "run": [run.name] * size,
            "iteration": np.full(size, revision.iteration, np.int64),
            "tokens_seen": pa.array([revision.tokens_seen] * size, pa.int64()),
            "k": np.full(size, run.manifest["k"], np.int32),
            "layer": np.full(size, layer, np.int16),
            "neuron": np.arange(size, dtype=np.int32),
            "count": columns["count"].astype(np.int64),
            **{
                name: nullable(columns[name])
                for name in (
                    "token_entropy",
                    "similarity",
                    "other_similarity",
                    "example_overlap",
                    "context_similarity",
                )
            },
            "best_match": pa.array(match.astype(np.int32), mask=match < 0),
            "specialised": columns["specialised"],
        }
    )


def _neuron_table(revisions: list[Revision], layer: int, formation: Columns) -> pa.Table:
    size = len(formation["drift"])
    iterations = np.array([revision.iteration for revision in revisions])

    def when(name: str) -> Any:
        place = formation[name]
        return pa.array(iterations[np.maximum(place, 0)], pa.int64(), mask=place < 0)

    return pa.table(
        {
            "layer": np.full(size, layer, np.int16),
            "neuron": np.arange(size, dtype=np.int32),
            "specialised_iteration": when("specialised_at"),
            "formed_iteration": when("formed_at"),
            "drift": nullable(formation["drift"]),
            "late_drift": nullable(formation["late_drift"]),
            "final_entropy": nullable(formation["final_entropy"]),
            "final_count": formation["final_count"].astype(np.int64),
        }
    )


def _values(config: TrackConfig, columns: Columns, measure: str) -> np.ndarray:
    """Return a measure of the neurons that are active enough, [N] with NaN for the others."""
    active = columns["count"] >= config.min_count
    if measure == "specialised":
        return columns[measure].astype(float)
    return np.where(active, columns[measure], np.nan)


def _summary(
    config: TrackConfig, revisions: list[Revision], found: dict[int, list[Columns]]
) -> list[dict[str, Any]]:
    rows = []
    for number, revision in enumerate(revisions):
        for measure in _MEASURES:
            by_layer = {
                layer: _values(config, columns[number], measure) for layer, columns in found.items()
            }
            everything = np.concatenate([*by_layer.values()])
            for layer, values in {**by_layer, ALL_LAYERS: everything}.items():
                interval = mean_interval(values, resamples=config.bootstrap, seed=config.seed)
                if interval is not None:
                    rows.append(
                        {
                            "iteration": revision.iteration,
                            "layer": layer,
                            "measure": measure,
                            **interval_columns(interval),
                        }
                    )
    return rows


def _claims(
    config: TrackConfig,
    revisions: list[Revision],
    found: dict[int, list[Columns]],
    layers: pa.Table,
) -> list[Claim]:
    def over_layers(number: int, measure: str) -> np.ndarray:
        return np.concatenate(
            [_values(config, columns[number], measure) for columns in found.values()]
        )

    middle, last = (len(revisions) - 1) // 2, len(revisions) - 1
    before = revisions[middle].iteration
    claims = [
        _paired(
            config,
            "track-same-neuron",
            f"At iteration {before} a neuron is more like itself at the end than like another one",
            "similarity (1 - JSD)",
            ("itself", over_layers(middle, "similarity")),
            ("another", over_layers(middle, "other_similarity")),
        ),
        _paired(
            config,
            "track-specialisation-grows",
            f"More neurons are specialised at iteration {revisions[last].iteration} than at "
            f"iteration {revisions[0].iteration}",
            f"share with token entropy {config.specialised_bits} bits below the corpus",
            ("at the end", over_layers(last, "specialised")),
            ("at the beginning", over_layers(0, "specialised")),
        ),
    ]
    if layers.num_rows:
        claims.append(_layers_claim(config, layers))
    return claims


def _layers_claim(config: TrackConfig, layers: pa.Table) -> Claim:
    own, other = (
        layers[name].to_numpy(zero_copy_only=False).astype(float)
        for name in ("similarity", "other_similarity")
    )
    return _paired(
        config,
        "track-layers",
        "A neuron is more like the same neuron of the next layer than like another there",
        "similarity (1 - JSD)",
        ("same number", own),
        ("another", other),
    )


def _paired(
    config: TrackConfig,
    identity: str,
    sentence: str,
    measure: str,
    one: tuple[str, np.ndarray],
    two: tuple[str, np.ndarray],
) -> Claim:
    """Return the claim that neurons have more of `one` than of `two`."""
    options = {"resamples": config.bootstrap, "seed": config.seed}
    return claim(
        "track",
        identity,
        sentence,
        measure,
        "",
        [row(name, mean_interval(values, **options)) for name, values in (one, two)],
        difference=(f"{one[0]} - {two[0]}", mean_interval(one[1] - two[1], **options)),
        holds_if="above",
        note="intervals by bootstrap over neurons",
    )
