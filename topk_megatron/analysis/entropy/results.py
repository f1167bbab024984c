"""The result of `entropy`: tables of neurons, means, differences and sensitivity, and claims."""

from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.entropy.blocks import block_intervals, difference_row
from topk_megatron.analysis.entropy.neurons import LayerEntropies, entropy_of
from topk_megatron.analysis.entropy.run import EntropyConfig, Measured, measure
from topk_megatron.analysis.entropy.semantic import Embed, Examples
from topk_megatron.analysis.measures import Interval, difference_interval, mean_interval
from topk_megatron.analysis.result import Claim, Result, claim, row
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import (
    ALL_LAYERS,
    INTERVAL,
    interval_columns,
    nullable,
    percentile_columns,
)

MEASURES = (
    "token_entropy",
    "token_entropy_plugin",
    "token_entropy_mass",
    "token_entropy_top",
    "semantic_entropy",
)
_PERCENTILES = (10, 25, 50, 75, 90)
_LISTS = {
    "top_tokens": pa.int32(),
    "top_shares": pa.float64(),
    "concept_tokens": pa.int32(),
    "concept_lifts": pa.float64(),
}
_SUMMARY = pa.schema(
    [
        ("run", pa.string()),
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("measure", pa.string()),
        *INTERVAL,
        ("resampled", pa.string()),
        *((f"p{p}", pa.float64()) for p in _PERCENTILES),
    ]
)
_DIFFERENCES = pa.schema(
    [
        ("measure", pa.string()),
        ("layer", pa.int16()),
        ("run_a", pa.string()),
        ("run_b", pa.string()),
        ("resampled", pa.string()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
_SENSITIVITY = pa.schema(
    [
        ("run", pa.string()),
        ("measure", pa.string()),
        ("setting", pa.string()),
        ("neurons", pa.int64()),
        ("mean", pa.float64()),
    ]
)
# Values of the active neurons, by (run, kind, layer, measure).
_Groups = dict[tuple[str, str, int, str], np.ndarray]


def entropy(config: EntropyConfig, embed: Embed | None = None) -> Result:
    """Measure and compare runs.

    Args:
        config: what to compare.
        embed: from texts to unit vectors; None loads the embedding model.

    Returns:
        The tables neurons, summary, differences and sensitivity. Without an embedding model,
        semantic entropies are null and ``parameters["semantic_refused"]`` says why.

    Raises:
        AnalysisError: a run is missing, unfinished, damaged or of other text.
    """
    found = measure(config, embed)
    groups = _groups(config, found.layers)
    blocks = block_intervals(config, found.runs)
    summary = [_summary_row(config, key, values) for key, values in groups.items() if len(values)]
    differences = _differences(config, found.runs, groups)
    rows = {
        "summary": (summary + blocks.summary, _SUMMARY),
        "differences": (differences + blocks.differences, _DIFFERENCES),
        "sensitivity": (_sensitivity(config, found), _SENSITIVITY),
    }
    tables = {name: pa.Table.from_pylist(*pair) for name, pair in rows.items()}
    neurons = pa.concat_tables([_neuron_table(one) for one in found.layers])
    return Result(
        tables={"neurons": neurons, **tables},
        claims=_claims(config, found, groups),
        parameters=_parameters(config, found),
    )


def _parameters(config: EntropyConfig, found: Measured) -> dict[str, Any]:
    return {
        "runs": config.runs,
        "min_count": config.min_count,
        "top_n": [run.manifest["top_n"] for run in found.runs],
        "distance": found.semantics.distance,
        "distance_quantile": config.distance_quantile if config.distance is None else None,
        "semantic_refused": found.semantics.refused,
        "semantic_neurons": config.semantic_neurons,
        "embedding": str(config.embedding) if config.embedding else "all-MiniLM-L6-v2",
        "bootstrap": config.bootstrap,
        "confidence": config.confidence,
        "seed": config.seed,
    }


def _neuron_table(one: LayerEntropies) -> pa.Table:
    size = len(one.neurons)
    columns: dict[str, Any] = {
        "run": [one.run] * size,
        "kind": [one.kind] * size,
        "layer": np.full(size, one.layer, np.int16),
        "neuron": one.neurons.astype(np.int32),
        "count": one.columns["count"].astype(np.int64),
        **{name: nullable(one.columns[name]) for name in MEASURES},
        "semantic_clusters": nullable(one.columns["semantic_clusters"]).cast(pa.int32()),
        "examples": one.columns["examples"].astype(np.int32),
    }
    for name, kind in _LISTS.items():
        columns[name] = pa.array([part.tolist() for part in one.lists[name]], pa.list_(kind))
    return pa.table(columns)


def _groups(config: EntropyConfig, layers: list[LayerEntropies]) -> _Groups:
    groups: _Groups = {}
    for one in layers:
        active = one.columns["count"] >= config.min_count
        for name in MEASURES:
            values = one.columns[name][active]
            values = values[~np.isnan(values)]
            groups[one.run, one.kind, one.layer, name] = values
            key = (one.run, one.kind, ALL_LAYERS, name)
            groups[key] = np.concatenate([groups.get(key, np.zeros(0)), values])
    return groups


def _summary_row(
    config: EntropyConfig, key: tuple[str, str, int, str], values: np.ndarray
) -> dict[str, Any]:
    interval = _interval(config, values)
    assert interval is not None
    run, kind, layer, name = key
    return {
        "run": run,
        "kind": kind,
        "layer": layer,
        "measure": name,
        **interval_columns(interval),
        "resampled": "neurons",
        **percentile_columns(values, _PERCENTILES),
    }


def _interval(config: EntropyConfig, values: np.ndarray) -> Interval | None:
    return mean_interval(
        values, resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
    )


def _compare(
    config: EntropyConfig, groups: _Groups, a: Run, b: str, layer: int, name: str
) -> Interval | None:
    """Return the mean of run `a` minus that of run `b`, which may be a control."""
    one = groups.get((a.name, a.kind, layer, name), np.zeros(0))
    other = next(
        (v for (run, _, at, m), v in groups.items() if (run, at, m) == (b, layer, name)),
        np.zeros(0),
    )
    return difference_interval(
        one,
        other,
        resamples=config.bootstrap,
        confidence=config.confidence,
        seed=config.seed,
    )


def _others(runs: list[Run]) -> list[str]:
    """Return what the first run is compared with: its control, and the other runs."""
    return [f"{runs[0].name}:shuffled", *(run.name for run in runs[1:])]


def _differences(config: EntropyConfig, runs: list[Run], groups: _Groups) -> list[dict[str, Any]]:
    first, rows = runs[0], []
    for name in MEASURES:
        for layer in (*first.layers, ALL_LAYERS):
            for other in _others(runs):
                interval = _compare(config, groups, first, other, layer, name)
                if interval is not None:
                    rows.append(difference_row(name, layer, first.name, other, "neurons", interval))
    return rows


def _sensitivity(config: EntropyConfig, found: Measured) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(run: str, name: str, setting: str, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else None
        numbers = {"neurons": len(values), "mean": mean}
        rows.append({"run": run, "measure": name, "setting": setting, **numbers})

    for run in dict.fromkeys(one.run for one in found.layers):
        layers = [one for one in found.layers if one.run == run]
        counts = np.concatenate([one.columns["count"] for one in layers])
        bits = np.concatenate([one.columns["token_entropy"] for one in layers])
        for least in (1, config.min_count, 4 * config.min_count):
            add(run, "token_entropy", f"min_count={least}", bits[counts >= least])
        if ":" not in run:
            for n, values in _cut_entropies(run, layers, found.examples).items():
                add(run, "token_entropy_top", f"top_n={n}", values)
    for (run, distance), values in found.semantics.sensitivity.items():
        add(run, "semantic_entropy", f"distance={distance:.3f}", np.array(values))
    return rows


def _cut_entropies(
    run: str, layers: list[LayerEntropies], examples: Examples
) -> dict[int, np.ndarray]:
    """Return token_entropy_top over a quarter, half and all of a run's examples."""
    tokens = [examples[run, one.layer].tokens for one in layers]
    sizes = [tokens[0].shape[1] // part for part in (4, 2, 1)]
    return {n: np.array([entropy_of(row[:n]) for own in tokens for row in own]) for n in sizes if n}


def _claims(config: EntropyConfig, found: Measured, groups: _Groups) -> list[Claim]:
    first = found.runs[0]
    words = {"token_entropy": "token entropy", "semantic_entropy": "semantic entropy"}
    claims = []
    for name, text in words.items():
        refused = found.semantics.refused
        if name == "semantic_entropy" and refused:
            note = f"not measured: {refused}"
            claims.append(claim("entropy", f"entropy-{name}", text, name, "bits", [], note=note))
            continue
        rows = [
            row(run, _interval(config, values))
            for (run, _, layer, m), values in groups.items()
            if m == name and layer == ALL_LAYERS
        ]
        for other in _others(found.runs):
            interval = _compare(config, groups, first, other, ALL_LAYERS, name)
            claims.append(
                claim(
                    "entropy",
                    f"entropy-{name}-{other}",
                    f"Neurons of {first.name} have lower {text} than those of {other}",
                    name,
                    "bits",
                    rows,
                    difference=(f"{first.name} - {other}", interval),
                    note=f"neurons with at least {config.min_count} activations; "
                    "intervals by bootstrap over neurons",
                )
            )
    return claims
