"""`steer`: push neurons while the model writes, and measure what it does and what it costs.

Success is how much more often the neuron's concept tokens appear than in the unsteered text;
damage is how much less likely the text is under the unsteered model. The control pushes another
neuron of the same layer, of nearly equal activity, by the same amount. This file measures;
results.py makes tables and claims of it.

Legend: S samples, P prompt tokens, T new tokens, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from topk_megatron.analysis.corpus import Corpus
from topk_megatron.analysis.entropy.neurons import telling_tokens
from topk_megatron.analysis.steer.generate import (
    Push,
    Sampling,
    generate,
    log_losses,
    logit_changes,
    next_logits,
    repetition,
)
from topk_megatron.analysis.study import Run
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel

LISTED = 10
_NEAREST = 5


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """What to push, and how far.

    Attributes:
        neurons: (layer, neuron) pairs; None draws `sample` of each layer.
        sample: neurons drawn per layer.
        min_count: activations that a drawn neuron needs.
        strengths: how far to push, in multiples of a neuron's largest recorded value.
        samples: prompts that each push continues.
        prompt_tokens: tokens per prompt.
        new_tokens: tokens to write.
        temperature: 0 takes the likeliest token.
        rows: rows per batch.
        seed: the seed of everything random.
        bootstrap: resamples of an interval.
    """

    neurons: list[tuple[int, int]] | None = None
    sample: int = 16
    min_count: int = 50
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    samples: int = 4
    prompt_tokens: int = 16
    new_tokens: int = 32
    temperature: float = 0.8
    rows: int = 128
    seed: int = 0
    bootstrap: int = 1000


@dataclass
class Subject:
    """A neuron to push, and its control.

    Attributes:
        layer: its layer.
        neuron: its number.
        control: the number of its control.
        unit: the absolute value of the neuron's largest recorded activation; a strength of 1 adds
            it.
        concept: token ids that set the neuron apart.
        promoted: token ids whose logits a push raises most; filled by `push_all`.
    """

    layer: int
    neuron: int
    control: int
    unit: float
    concept: np.ndarray
    promoted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass
class Trial:
    """What one push of one subject did.

    Attributes:
        subject: place of the subject among the subjects; -1 without a push.
        strength: how far it was pushed.
        control: whether its control was pushed instead.
        tokens: int64 [S, T], the new tokens.
        losses: float32 [S], their mean loss in nats under the unpushed model.
    """

    subject: int
    strength: float
    control: bool
    tokens: Tensor
    losses: Tensor


@dataclass
class Steered:
    """All trials, and what they are compared with.

    Attributes:
        subjects: the neurons that were pushed.
        prompts: int64 [S, P].
        base: the unsteered text.
        trials: every subject at every strength, each followed by its control.
        changes: float32 [subjects, V], the change of the next token's logits at strength 1.
    """

    subjects: list[Subject]
    prompts: Tensor
    base: Trial
    trials: list[Trial]
    changes: Tensor


def push_all(config: SteerConfig, folder: OpenModel, run: Run, corpus: Corpus) -> Steered:
    """Push every subject and its control at every strength.

    Raises:
        AnalysisError: a neuron or layer is out of range, the run is of an SAE or of another model,
            or the corpus is too short for the prompts.
    """
    check_model(folder, run)
    subjects = choose_subjects(config, run)
    prompts = choose_prompts(config, corpus)
    everyone = list(range(config.samples))
    sampling = Sampling(config.new_tokens, config.temperature, config.seed)
    written = generate(folder, prompts, [None] * config.samples, everyone, sampling)
    base = Trial(-1, 0.0, False, written, log_losses(folder, prompts, written))
    logits = next_logits(folder, prompts, None)
    pushes = [Push(s.layer, s.neuron, s.unit) for s in subjects]
    changes = logit_changes(folder, prompts, pushes, logits)
    for subject, change in zip(subjects, changes, strict=True):
        subject.promoted = change.topk(min(LISTED, len(change))).indices.numpy()
    plan = [
        (number, strength, control)
        for number in range(len(subjects))
        for strength in config.strengths
        for control in (False, True)
    ]
    step = max(1, config.rows // config.samples)
    trials: list[Trial] = []
    for begin in range(0, len(plan), step):
        trials += _batch(config, folder, subjects, prompts, plan[begin : begin + step], sampling)
    return Steered(subjects, prompts, base, trials, changes)


def _batch(
    config: SteerConfig,
    folder: OpenModel,
    subjects: list[Subject],
    prompts: Tensor,
    plan: list[tuple[int, float, bool]],
    sampling: Sampling,
) -> list[Trial]:
    pushes: list[Push | None] = []
    for number, strength, control in plan:
        subject = subjects[number]
        neuron = subject.control if control else subject.neuron
        pushes += [Push(subject.layer, neuron, strength * subject.unit)] * config.samples
    repeated = prompts.repeat(len(plan), 1)
    groups = list(range(config.samples)) * len(plan)
    written = generate(folder, repeated, pushes, groups, sampling)
    losses = log_losses(folder, repeated, written)
    return [
        Trial(number, strength, control, *parts)
        for (number, strength, control), *parts in zip(
            plan, written.split(config.samples), losses.split(config.samples), strict=True
        )
    ]


def check_model(folder: OpenModel, run: Run) -> None:
    """Refuse a run of another model, or one whose neurons are not coordinates of a hidden state."""
    if run.kind == "sae":
        raise AnalysisError(
            f"the run {run.name} records SAE latents; steer pushes neurons of a hidden state, "
            "so give a run of the model itself"
        )
    if run.manifest["model"]["fingerprint"] != folder.fingerprint():
        raise AnalysisError(
            f"the run {run.name} was recorded with another model than {folder.path}; give the "
            "folder that it was recorded with"
        )


def choose_subjects(config: SteerConfig, run: Run) -> list[Subject]:
    """Return the neurons asked for, or a random sample of each layer's active ones."""
    wanted = _wanted(config, run)
    marginal = run.vocabulary["count"].to_numpy().astype(np.float64)
    subjects: list[Subject] = []
    for layer, neurons in wanted.items():
        histogram = run.histogram(layer)
        concepts = telling_tokens(histogram, marginal / marginal.sum())["concept_tokens"]
        totals = histogram.totals
        table = run.neurons.filter(pa.array(run.neurons["layer"].to_numpy() == layer))
        largest = table["max"].to_numpy(zero_copy_only=False)
        rng = np.random.default_rng([config.seed, layer])
        if neurons is None:
            active = np.flatnonzero(totals >= config.min_count)
            able = [neuron for neuron in active if len(concepts[neuron])]
            neurons = sorted(rng.permutation(able)[: config.sample].tolist())
        for neuron in neurons:
            if not len(concepts[neuron]):
                raise AnalysisError(
                    f"neuron {neuron} of layer {layer} has no concept tokens: it was never active "
                    f"in the run {run.name}, or not twice on one token"
                )
            control = equal_activity(totals, neuron, rng)
            unit = float(abs(largest[neuron]))
            subjects.append(Subject(layer, neuron, control, unit, concepts[neuron]))
    if not subjects:
        raise AnalysisError(
            f"no neuron of the run {run.name} has {config.min_count} activations; lower --min-count"
        )
    return subjects


def _wanted(config: SteerConfig, run: Run) -> dict[int, list[int] | None]:
    """Return the neurons asked for by layer; None leaves the choice open."""
    if config.neurons is None:
        return dict.fromkeys(run.layers)
    wanted: dict[int, list[int] | None] = {}
    for layer, neuron in config.neurons:
        run.check_layer(layer)
        run.check_neuron(neuron)
        wanted[layer] = [*(wanted.get(layer) or []), neuron]
    return wanted


def equal_activity(totals: np.ndarray, neuron: int, rng: np.random.Generator) -> int:
    """Draw one of the five other neurons whose numbers of activations are nearest."""
    distance = np.abs(totals - totals[neuron]).astype(np.float64)
    distance[neuron] = np.inf
    nearest = np.argsort(distance, kind="stable")[: min(_NEAREST, len(totals) - 1)]
    return int(rng.choice(nearest))


def choose_prompts(config: SteerConfig, corpus: Corpus) -> Tensor:
    """Return prompts from random places of the corpus, int64 [S, P]."""
    room = len(corpus.tokens) - config.prompt_tokens
    if room < config.samples:
        raise AnalysisError(
            f"the corpus {corpus.path} is too short for {config.samples} prompts of "
            f"{config.prompt_tokens} tokens; give more text or fewer --samples"
        )
    starts = np.sort(np.random.default_rng(config.seed).choice(room, config.samples, replace=False))
    rows = [corpus.tokens[start : start + config.prompt_tokens] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def rate(tokens: Tensor, wanted: np.ndarray) -> float:
    """Return the share of tokens that are among the wanted ones."""
    return float(torch.isin(tokens, torch.from_numpy(wanted.astype(np.int64))).double().mean())


def measure(subject: Subject, trial: Trial, base: Trial) -> dict[str, Any]:
    """Return the numbers of steer/neurons.parquet for one push."""
    concept, base_concept = (rate(t.tokens, subject.concept) for t in (trial, base))
    loss, base_loss = (float(t.losses.double().mean()) for t in (trial, base))
    return {
        "strength": trial.strength,
        "unit": subject.unit,
        "samples": len(trial.tokens),
        "tokens": trial.tokens.numel(),
        "concept_rate": concept,
        "base_rate": base_concept,
        "success": concept - base_concept,
        "promoted_rate": rate(trial.tokens, subject.promoted),
        "promoted_base_rate": rate(base.tokens, subject.promoted),
        "perplexity": float(np.exp(loss)),
        "base_perplexity": float(np.exp(base_loss)),
        "damage": (loss - base_loss) / float(np.log(2)),
        "repetition": float(repetition(trial.tokens).mean()),
        "base_repetition": float(repetition(base.tokens).mean()),
    }
