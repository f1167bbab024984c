"""Summaries, comparisons and claims of `entropy`, and the files that hold them."""

from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.claims import claim, row
from topk_megatron.analysis.entropy.blocks import block_intervals
from topk_megatron.analysis.entropy.neurons import LayerEntropies, LayerExamples
from topk_megatron.analysis.measures import (
    Interval,
    difference_interval,
    mean_interval,
    plugin_entropy,
)
from topk_megatron.analysis.study import Run, write_claims, write_json
from topk_megatron.analysis.tables import write_table

MEASURES = (
    "token_entropy",
    "token_entropy_plugin",
    "token_entropy_mass",
    "token_entropy_top",
    "semantic_entropy",
)
ALL_LAYERS = -1
_PERCENTILES = (10, 25, 50, 75, 90)


def write_results(
    config: Any,
    runs: list[Run],
    found: list[LayerEntropies],
    examples: dict[tuple[str, int], LayerExamples],
    semantics: Any,
    parameters: dict[str, Any],
) -> None:
    """Write everything under entropy/, parameters last."""
    directory = config.study / "entropy"
    write_table(directory / "neurons.parquet", neuron_table(found))
    groups = _groups(config, found)
    blocks = block_intervals(config, runs)
    summary = [_summary_row(config, key, values) for key, values in groups.items() if len(values)]
    summary += blocks.summary
    write_table(directory / "summary.parquet", pa.Table.from_pylist(summary, _SUMMARY))
    differences = _differences(config, runs, groups) + blocks.differences
    write_table(directory / "differences.parquet", pa.Table.from_pylist(differences, _DIFFERENCES))
    sensitivity = _sensitivity(config, found, examples, semantics)
    write_table(directory / "sensitivity.parquet", pa.Table.from_pylist(sensitivity, _SENSITIVITY))
    write_claims(config.study, "entropy", _claims(config, runs, groups, semantics))
    write_json(directory / "parameters.json", parameters)


def neuron_table(found: list[LayerEntropies]) -> pa.Table:
    """entropy/neurons.parquet."""
    return pa.concat_tables([_layer_table(one) for one in found])


def _layer_table(one: LayerEntropies) -> pa.Table:
    size = len(one.neurons)
    columns: dict[str, Any] = {
        "run": [one.run] * size,
        "kind": [one.kind] * size,
        "layer": np.full(size, one.layer, np.int16),
        "neuron": one.neurons.astype(np.int32),
        "count": one.columns["count"].astype(np.int64),
    }
    for name in MEASURES:
        values = one.columns[name]
        columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
    number = one.columns["semantic_clusters"]
    missing = np.isnan(number)
    columns["semantic_clusters"] = pa.array(
        np.where(missing, 0, number).astype(np.int32), mask=missing
    )
    columns["examples"] = one.columns["examples"].astype(np.int32)
    for name, kind in _LISTS.items():
        columns[name] = pa.array([part.tolist() for part in one.lists[name]], pa.list_(kind))
    return pa.table(columns)


_LISTS = {
    "top_tokens": pa.int32(),
    "top_shares": pa.float64(),
    "concept_tokens": pa.int32(),
    "concept_lifts": pa.float64(),
}
_INTERVAL = [("mean", pa.float64()), ("low", pa.float64()), ("high", pa.float64())]
_SUMMARY = pa.schema(
    [
        ("run", pa.string()),
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("measure", pa.string()),
        ("neurons", pa.int64()),
        *_INTERVAL,
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

# Values of the neurons that count, by (run, kind, layer, measure).
_Groups = dict[tuple[str, str, int, str], np.ndarray]


def _groups(config: Any, found: list[LayerEntropies]) -> _Groups:
    groups: _Groups = {}
    for one in found:
        active = one.columns["count"] >= config.min_count
        for measure in MEASURES:
            values = one.columns[measure][active]
            values = values[~np.isnan(values)]
            groups[one.run, one.kind, one.layer, measure] = values
            key = (one.run, one.kind, ALL_LAYERS, measure)
            groups[key] = np.concatenate([groups.get(key, np.zeros(0)), values])
    return groups


def _summary_row(config: Any, key: tuple[str, str, int, str], values: np.ndarray) -> dict[str, Any]:
    interval = mean_interval(
        values, resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
    )
    assert interval is not None
    run, kind, layer, measure = key
    return {
        "run": run,
        "kind": kind,
        "layer": layer,
        "measure": measure,
        "neurons": interval.n,
        "mean": interval.value,
        "low": interval.low,
        "high": interval.high,
        "resampled": "neurons",
        **{f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES},
    }


def _compare(config: Any, groups: _Groups, a: Run, b: str, layer: int, measure: str) -> Any:
    one = groups.get((a.name, a.kind, layer, measure), np.zeros(0))
    other = next(
        (v for (run, _, at, m), v in groups.items() if (run, at, m) == (b, layer, measure)),
        np.zeros(0),
    )
    return difference_interval(
        one,
        other,
        resamples=config.bootstrap,
        confidence=config.confidence,
        seed=config.seed,
    )


def _differences(config: Any, runs: list[Run], groups: _Groups) -> list[dict[str, Any]]:
    first, rows = runs[0], []
    others = [f"{first.name}:shuffled", *(run.name for run in runs[1:])]
    for measure in MEASURES:
        for layer in (*first.layers, ALL_LAYERS):
            for other in others:
                interval = _compare(config, groups, first, other, layer, measure)
                if interval is not None:
                    rows.append(
                        {
                            "measure": measure,
                            "layer": layer,
                            "run_a": first.name,
                            "run_b": other,
                            "resampled": "neurons",
                            "difference": interval.value,
                            "low": interval.low,
                            "high": interval.high,
                        }
                    )
    return rows


def _sensitivity(
    config: Any,
    found: list[LayerEntropies],
    examples: dict[tuple[str, int], LayerExamples],
    semantics: Any,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(run: str, measure: str, setting: str, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else None
        rows.append(
            {
                "run": run,
                "measure": measure,
                "setting": setting,
                "neurons": len(values),
                "mean": mean,
            }
        )

    for run in dict.fromkeys(one.run for one in found):
        layers = [one for one in found if one.run == run]
        counts = np.concatenate([one.columns["count"] for one in layers])
        bits = np.concatenate([one.columns["token_entropy"] for one in layers])
        for least in (1, config.min_count, 4 * config.min_count):
            add(run, "token_entropy", f"min_count={least}", bits[counts >= least])
        if ":" not in run:
            for part in (4, 2, 1):
                own = [examples[run, one.layer] for one in layers]
                n = own[0].tokens.shape[1] // part
                if n:
                    add(run, "token_entropy_top", f"top_n={n}", _cut_entropies(own, n))
    for (run, distance), values in semantics.sensitivity.items():
        add(run, "semantic_entropy", f"distance={distance:.3f}", np.array(values))
    return rows


def _cut_entropies(examples: list[LayerExamples], n: int) -> np.ndarray:
    bits = [
        plugin_entropy(counts, np.zeros(len(counts), np.int64), 1)[0]
        for own in examples
        for counts in (np.unique(tokens[:n], return_counts=True)[1] for tokens in own.tokens)
    ]
    return np.array(bits)


def _claims(config: Any, runs: list[Run], groups: _Groups, semantics: Any) -> list[dict[str, Any]]:
    first = runs[0]
    names = {"token_entropy": "token entropy", "semantic_entropy": "semantic entropy"}
    found = []
    for measure, words in names.items():
        if measure == "semantic_entropy" and semantics.refused:
            note = f"not measured: {semantics.refused}"
            found.append(
                claim("entropy", f"entropy-{measure}", f"{words}", measure, "bits", [], note=note)
            )
            continue
        rows = [
            row(run, _interval(config, values))
            for (run, _, layer, m), values in groups.items()
            if m == measure and layer == ALL_LAYERS
        ]
        for other in [f"{first.name}:shuffled", *(run.name for run in runs[1:])]:
            interval = _compare(config, groups, first, other, ALL_LAYERS, measure)
            found.append(
                claim(
                    "entropy",
                    f"entropy-{measure}-{other}",
                    f"Neurons of {first.name} have lower {words} than those of {other}",
                    measure,
                    "bits",
                    rows,
                    difference=(f"{first.name} - {other}", interval),
                    note=f"neurons with at least {config.min_count} activations; "
                    "intervals by bootstrap over neurons",
                )
            )
    return found


def _interval(config: Any, values: np.ndarray) -> Interval | None:
    return mean_interval(
        values, resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
    )
