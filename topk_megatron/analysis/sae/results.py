"""The result of `sae`: how stable SAE latents are, compared with a TopK LM's neurons.

Two SAEs that differ in their seed see the same hidden states in another order. A latent of one is
matched to the latent of the other with the nearest token distribution, as neurons of two
checkpoints of a TopK LM are; decoder directions are compared too, where there are decoders.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.histograms import match_neurons
from topk_megatron.analysis.measures import difference_interval, mean_interval
from topk_megatron.analysis.result import Claim, Result, claim, row
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import ALL_LAYERS, INTERVAL, interval_columns, nullable

_SUMMARY = pa.schema(
    [
        ("comparison", pa.string()),
        ("layer", pa.int16()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("measure", pa.string()),
        *INTERVAL,
    ]
)


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """When two neurons are the same.

    Attributes:
        min_count: activations that a neuron needs.
        threshold: least affinity, and least cosine of decoder directions.
        bootstrap: resamples of an interval.
        seed: the seed of the resampling.
    """

    min_count: int = 50
    threshold: float = 0.7
    bootstrap: int = 1000
    seed: int = 0


# The columns of sae/matches.parquet for one layer and comparison, and which neurons are active.
Columns = dict[str, np.ndarray]


def match_layer(
    config: MatchConfig, one: Run, other: Run, layer: int, decoders: tuple[Any, Any] | None
) -> Columns:
    """Match the neurons of a layer of two runs; SAEs also have their decoders [N, H] compared."""
    first, second = one.histogram(layer), other.histogram(layer)
    found = match_neurons(first, second)
    cosine = np.full(first.width, np.nan)
    if decoders is not None:
        unit = [d / np.linalg.norm(d, axis=1, keepdims=True).clip(1e-12) for d in decoders]
        cosine = (unit[0] @ unit[1].T).max(axis=1)
    near = np.nan_to_num(found.affinity) >= config.threshold
    return {
        "match": found.match,
        "affinity": found.affinity,
        "mutual": found.mutual,
        "same_index": found.match == np.arange(first.width),
        "decoder_cosine": cosine,
        "matched": found.mutual & near,
        "active": first.totals >= config.min_count,
    }


def sae(
    config: MatchConfig,
    comparisons: dict[str, tuple[Run, Run]],
    decoders: dict[int, tuple[Any, Any]],
    facts: dict[str, Any],
) -> Result:
    """Match the neurons of pairs of runs.

    Args:
        config: when neurons match.
        comparisons: by name (``sae_seeds``, ``topk_checkpoints``), two runs.
        decoders: by layer, the decoders [N, H] of the two SAEs.
        facts: further entries of the parameters.

    Returns:
        The tables matches and summary; `baseline` has written training and quality.
    """
    matches, summary = [], []
    shares: dict[str, np.ndarray] = {}
    for name, (one, other) in comparisons.items():
        found = _match_runs(config, one, other, decoders if name == "sae_seeds" else {})
        matches += [_table(name, one, other, layer, columns) for layer, columns in found.items()]
        where = {"comparison": name, "a": one.name, "b": other.name}
        summary += _summary(config, where, found)
        shares[name] = _measures(config, [*found.values()])["matched_share"]
    parameters = {
        "comparisons": {n: [a.name, b.name] for n, (a, b) in comparisons.items()},
        "min_count": config.min_count,
        "threshold": config.threshold,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        **facts,
    }
    tables = {
        "matches": pa.concat_tables(matches),
        "summary": pa.Table.from_pylist(summary, _SUMMARY),
    }
    return Result(tables=tables, claims=[_claim(config, shares)], parameters=parameters)


def _match_runs(
    config: MatchConfig, one: Run, other: Run, decoders: dict[int, tuple[Any, Any]]
) -> dict[int, Columns]:
    """Match the layers that both runs have."""
    shared = [layer for layer in one.layers if layer in other.layers]
    return {layer: match_layer(config, one, other, layer, decoders.get(layer)) for layer in shared}


def _measures(config: MatchConfig, parts: list[Columns]) -> dict[str, np.ndarray]:
    def active(name: str) -> np.ndarray:
        return np.concatenate([columns[name][columns["active"]] for columns in parts])

    cosine = active("decoder_cosine")
    return {
        "matched_share": active("matched").astype(float),
        "same_index_share": active("same_index").astype(float),
        "decoder_share": np.where(
            np.isnan(cosine), np.nan, (cosine >= config.threshold).astype(float)
        ),
    }


def _summary(
    config: MatchConfig, where: dict[str, Any], found: dict[int, Columns]
) -> list[dict[str, Any]]:
    rows = []
    groups = {layer: [columns] for layer, columns in found.items()}
    for layer, parts in {**groups, ALL_LAYERS: [*found.values()]}.items():
        for measure, values in _measures(config, parts).items():
            interval = mean_interval(values, resamples=config.bootstrap, seed=config.seed)
            if interval is not None:
                named = {**where, "layer": layer, "measure": measure}
                rows.append({**named, **interval_columns(interval)})
    return rows


def _table(name: str, one: Run, other: Run, layer: int, columns: Columns) -> pa.Table:
    size = one.width
    return pa.table(
        {
            "comparison": [name] * size,
            "layer": np.full(size, layer, np.int16),
            "a": [one.name] * size,
            "b": [other.name] * size,
            "neuron": np.arange(size, dtype=np.int32),
            "match": pa.array(columns["match"].astype(np.int32), mask=columns["match"] < 0),
            "affinity": nullable(columns["affinity"]),
            "mutual": columns["mutual"],
            "same_index": columns["same_index"],
            "decoder_cosine": nullable(columns["decoder_cosine"]),
            "matched": columns["matched"],
        }
    )


def _claim(config: MatchConfig, shares: dict[str, np.ndarray]) -> Claim:
    options: dict[str, Any] = {"resamples": config.bootstrap, "seed": config.seed}
    names = {
        "topk_checkpoints": "TopK neurons, two checkpoints",
        "sae_seeds": "SAE latents, two seeds",
    }
    difference = None
    if len(shares) == 2:
        interval = difference_interval(shares["topk_checkpoints"], shares["sae_seeds"], **options)
        difference = ("TopK - SAE", interval)
    return claim(
        "sae",
        "sae-stability",
        "Neurons of a TopK LM are found again at another checkpoint more often than latents of a "
        "SAE are under another seed",
        f"share matched: nearest of each other, affinity at least {config.threshold}",
        "share of neurons",
        [row(names[name], mean_interval(values, **options)) for name, values in shares.items()],
        difference=difference,
        holds_if="above",
        note=f"neurons with at least {config.min_count} activations; intervals by bootstrap over "
        "neurons; two checkpoints and two seeds are not the same kind of change",
    )
