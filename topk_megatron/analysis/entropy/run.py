"""`entropy`: how specialised neurons are, by the tokens and by the contexts they fire on.

This file measures; results.py makes tables and claims of it. Formulas and choices:
docs/analysis.md.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topk_megatron.analysis.entropy.neurons import (
    LayerEntropies,
    control_entropies,
    layer_examples,
    token_entropies,
)
from topk_megatron.analysis.entropy.semantic import Embed, Examples, Semantics, measure_semantics
from topk_megatron.analysis.study import Run, open_runs
from topk_megatron.errors import AnalysisError


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """What to compare.

    Attributes:
        study: the study directory.
        runs: names of the runs; the first is compared with each other one.
        min_count: activations that a neuron needs to be part of a mean.
        semantic: also measure semantic entropy.
        semantic_neurons: neurons per layer whose semantic entropy is measured; None is all.
        embedding: folder of a sentence-transformers model; None is all-MiniLM-L6-v2.
        distance: cosine distance that separates clusters; None takes `distance_quantile` of random
            pairs of contexts.
        distance_quantile: see `distance`.
        bootstrap: resamples of an interval.
        confidence: the share of the resamples that an interval covers.
        seed: the seed of everything random.
    """

    study: Path
    runs: list[str]
    min_count: int = 50
    semantic: bool = True
    semantic_neurons: int | None = None
    embedding: Path | None = None
    distance: float | None = None
    distance_quantile: float = 0.05
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """The entropies of all runs.

    Attributes:
        runs: the runs, in the order asked for.
        layers: the columns of each run and layer, its control after it.
        examples: the examples of each run and layer, and those of the controls.
        semantics: how semantic entropies were measured.
    """

    runs: list[Run]
    layers: list[LayerEntropies]
    examples: Examples
    semantics: Semantics


def measure(config: EntropyConfig, embed: Embed | None = None) -> Measured:
    """Measure every neuron of the runs, and of their shuffled controls.

    Raises:
        AnalysisError: a run is missing, unfinished, damaged or of other text.
    """
    if not config.runs:
        raise AnalysisError("--runs names no run to measure")
    if len(set(config.runs)) != len(config.runs):
        raise AnalysisError("--runs names a run twice")
    runs = open_runs(config.study, config.runs)
    rng = np.random.default_rng(config.seed)
    found: list[LayerEntropies] = []
    examples: Examples = {}
    for run in runs:
        for layer in run.layers:
            own = layer_examples(run, layer)
            found.append(token_entropies(run, layer, own))
            control = control_entropies(run, layer, own, rng)
            found.append(control)
            examples[run.name, layer] = own
            examples[control.run, layer] = own.shuffled(rng)
    return Measured(runs, found, examples, measure_semantics(config, found, examples, embed))
