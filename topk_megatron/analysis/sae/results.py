"""`sae`: the post-hoc baseline, and how stable its latents are beside a TopK LM's neurons.

Two SAEs that differ in their seed see the same hidden states in another order. A latent of one is
matched to the latent of the other whose token distribution is nearest, the same as neurons of two
checkpoints of a TopK LM are; decoder directions are compared besides, where there are decoders.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topk_megatron.analysis.claims import claim, row
from topk_megatron.analysis.matching import match_neurons
from topk_megatron.analysis.measures import difference_interval, mean_interval
from topk_megatron.analysis.study import Run, write_claims, write_json
from topk_megatron.analysis.tables import write_table
from topk_megatron.analysis.track.run import nullable


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """When two neurons are the same.

    Attributes:
        study: the study directory.
        min_count: activations that a neuron needs.
        threshold: least affinity, and least cosine of decoder directions.
        bootstrap: resamples of an interval.
        seed: of the resampling.
    """

    study: Path
    min_count: int = 50
    threshold: float = 0.7
    bootstrap: int = 1000
    seed: int = 0


# Columns of sae/matches.parquet of one layer and comparison, and which neurons count.
Columns = dict[str, np.ndarray]


def match_layer(
    config: MatchConfig, one: Run, other: Run, layer: int, decoders: tuple[Any, Any] | None
) -> Columns:
    """Match the neurons of a layer of two runs; decoders [N, H] where they are SAEs."""
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


def write_matches(
    config: MatchConfig,
    comparisons: dict[str, tuple[Run, Run]],
    decoders: dict[int, tuple[Any, Any]],
    facts: dict[str, Any],
) -> None:
    """Match, and write matches.parquet, summary.parquet and the claims.

    Args:
        config: when neurons match.
        comparisons: by name (``sae_seeds``, ``topk_checkpoints``), two runs.
        decoders: by layer, the decoders [N, H] of the two SAEs.
        facts: what parameters.json also says.
    """
    directory = config.study / "sae"
    tables, summary = [], []
    shares: dict[str, np.ndarray] = {}
    for name, (one, other) in comparisons.items():
        layers = [layer for layer in one.layers if layer in other.layers]
        found = {
            layer: match_layer(
                config, one, other, layer, decoders.get(layer) if name == "sae_seeds" else None
            )
            for layer in layers
        }
        tables += [_table(name, one, other, layer, columns) for layer, columns in found.items()]
        groups = {**{layer: [columns] for layer, columns in found.items()}, -1: [*found.values()]}
        for layer, parts in groups.items():
            for measure, values in _measures(config, parts).items():
                summary += _summary_row(config, name, layer, one, other, measure, values)
                if layer == -1 and measure == "matched_share":
                    shares[name] = values
    write_table(directory / "matches.parquet", pa.concat_tables(tables))
    write_table(directory / "summary.parquet", pa.Table.from_pylist(summary, _SUMMARY))
    write_claims(config.study, "sae", [_claim(config, shares)])
    write_json(
        directory / "parameters.json",
        {
            "comparisons": {n: [a.name, b.name] for n, (a, b) in comparisons.items()},
            "min_count": config.min_count,
            "threshold": config.threshold,
            "bootstrap": config.bootstrap,
            "seed": config.seed,
            **facts,
        },
    )


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


def _summary_row(
    config: MatchConfig,
    name: str,
    layer: int,
    one: Run,
    other: Run,
    measure: str,
    values: np.ndarray,
) -> list[dict[str, Any]]:
    interval = mean_interval(values, resamples=config.bootstrap, seed=config.seed)
    if interval is None:
        return []
    return [
        {
            "comparison": name,
            "layer": layer,
            "a": one.name,
            "b": other.name,
            "measure": measure,
            "neurons": interval.n,
            "mean": interval.value,
            "low": interval.low,
            "high": interval.high,
        }
    ]


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


_SUMMARY = pa.schema(
    [
        ("comparison", pa.string()),
        ("layer", pa.int16()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("measure", pa.string()),
        ("neurons", pa.int64()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def _claim(config: MatchConfig, shares: dict[str, np.ndarray]) -> dict[str, Any]:
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
