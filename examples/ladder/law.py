"""Fits the loss as a law of parameters and tokens, and reads the tax off two fits.

The law is that of Hoffmann et al. (2203.15556, section 3.3):

    L(N, D) = E + A / N^alpha + B / D^beta

N counts the parameters outside the embedding, D the training tokens. As there, the logarithms of
the losses are fitted with Huber's loss, so that one odd run decides little. Intervals come from a
bootstrap over held-out documents and seeds. Both are drawn in pairs: a document or a seed that is
drawn for one variant is drawn for the other too, because both saw the same batches and were
measured on the same text.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import brentq, least_squares

from topk_megatron.analysis.measures import Interval

_HUBER = 1e-3  # of log loss, as in the paper
_STARTS = tuple(itertools.product((0.5, 1.0), (0.2, 0.5), (0.2, 0.5)))
RESAMPLES = 300


@dataclass(frozen=True)
class Observation:
    """The loss of one model after one training.

    Attributes:
        variant: The model's variant.
        depth: Its rung.
        seed: Its seed.
        parameters: N.
        tokens: D.
        losses: Sum of losses on each held-out document, in nats, float64 [documents].
        counts: Predicted tokens of each document, float64 [documents].
    """

    variant: str
    depth: int
    seed: int
    parameters: float
    tokens: float
    losses: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        floor: E, nats.
        log_a: Logarithm of A.
        alpha: Exponent of the parameters.
        log_b: Logarithm of B.
        beta: Exponent of the tokens.
    """

    floor: float
    log_a: float
    alpha: float
    log_b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the predicted loss, nats per token."""
        return float(_predict(np.array(astuple(self)), np.log([parameters]), np.log([tokens]))[0])


def read_observations(results: Iterable[Path]) -> list[Observation]:
    """Read the files that `measure` wrote; each has one observation for every leg."""
    found = []
    for path in sorted(results):
        run = json.loads(path.read_text())
        for leg in run["legs"]:
            losses, counts = (np.array(leg[name], float) for name in ("losses", "counts"))
            where = (run["variant"], run["depth"], run["seed"])
            found.append(Observation(*where, run["parameters"], leg["tokens"], losses, counts))
    return found


def fit(observations: Sequence[Observation], start: Law | None = None) -> Law:
    """Fit the law to the mean losses of the observations.

    Args:
        observations: Of one variant, at two sizes and two lengths of training or more.
        start: Where the search begins; None tries several places.

    Raises:
        ValueError: If there are fewer observations than the law has constants.
    """
    losses = np.array([one.losses.sum() / one.counts.sum() for one in observations])
    return _fit(_sizes(observations), losses, start)


def _sizes(observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    parameters = np.log([one.parameters for one in observations])
    return parameters, np.log([one.tokens for one in observations])


def _predict(law: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    floor, log_a, alpha, log_b, beta = law
    return floor + np.exp(log_a - alpha * parameters) + np.exp(log_b - beta * tokens)


def _fit(sizes: tuple[np.ndarray, np.ndarray], losses: np.ndarray, start: Law | None = None) -> Law:
    if len(losses) < len(astuple(_UNIT)):
        raise ValueError(
            f"a law has {len(astuple(_UNIT))} constants, but there are {len(losses)} losses"
        )
    parameters, tokens = sizes
    low = losses.min()
    starts = [astuple(start)] if start else []
    for share, alpha, beta in () if start else _STARTS:
        # Each term begins with half of what is above the floor at the middle of the ladder.
        floor = low * share * 0.8
        half = math.log((losses.mean() - floor) / 2)
        mean = (alpha * parameters.mean(), beta * tokens.mean())
        starts.append((floor, half + mean[0], alpha, half + mean[1], beta))
    best = min(
        (
            least_squares(
                lambda law: (
                    np.log(np.maximum(_predict(law, parameters, tokens), 1e-6)) - np.log(losses)
                ),
                one,
                loss="huber",
                f_scale=_HUBER,
                x_scale=(0.1, 1, 0.05, 1, 0.05),
                bounds=([0, -50, 0, -50, 0], [low, 50, 2, 50, 2]),
                max_nfev=2000,
            )
            for one in starts
        ),
        key=lambda found: found.cost,
    )
    return Law(*map(float, best.x))


_UNIT = Law(0, 0, 0, 0, 0)


def tax_percent(dense: Law, other: Law, parameters: float, tokens: float) -> float:
    """Return by how many per cent the perplexity is above the dense twin's."""
    return 100 * math.expm1(other.loss(parameters, tokens) - dense.loss(parameters, tokens))


def extra_compute(dense: Law, other: Law, parameters: float, tokens: float) -> float:
    """Return the factor of compute with which the other model reaches the dense twin's loss.

    Both its parameters and its tokens grow by the square root of the factor, which is sought
    between 1/1000 and 1000 and is infinite if no such model reaches the loss.
    """
    target = dense.loss(parameters, tokens)

    def above(log_factor: float) -> float:
        scale = math.exp(log_factor / 2)
        return other.loss(parameters * scale, tokens * scale) - target

    end = math.log(1000)
    if above(end) > 0:
        return math.inf
    if above(-end) < 0:
        return math.exp(-end)
    root: float = brentq(above, -end, end)  # pyright: ignore[reportAssignmentType]
    return math.exp(root)


def resampled_laws(
    observations: Mapping[str, Sequence[Observation]],
    laws: Mapping[str, Law],
    resamples: int = RESAMPLES,
) -> list[dict[str, Law]]:
    """Fit the laws of all variants again to documents and seeds drawn with replacement.

    Args:
        observations: By variant; all were measured on the same documents.
        laws: The fits to all observations, from which each search starts.
        resamples: How often to draw.
    """
    generator = np.random.default_rng(0)
    some = next(iter(observations.values()))
    documents = len(some[0].counts)
    seeds = {
        depth: sorted({o.seed for each in observations.values() for o in each if o.depth == depth})
        for depth in sorted({o.depth for each in observations.values() for o in each})
    }
    found = []
    for _ in range(resamples):
        drawn = generator.integers(documents, size=documents)
        chosen = {depth: generator.choice(list(all_), len(all_)) for depth, all_ in seeds.items()}
        found.append(
            {name: _refit(each, laws[name], drawn, chosen) for name, each in observations.items()}
        )
    return found


def _refit(
    observations: Sequence[Observation],
    start: Law,
    documents: np.ndarray,
    seeds: Mapping[int, np.ndarray],
) -> Law:
    picked = [one for one in observations for _ in range(int((seeds[one.depth] == one.seed).sum()))]
    losses = [one.losses[documents].sum() / one.counts[documents].sum() for one in picked]
    return _fit(_sizes(picked), np.array(losses), start)


def interval_of(value: float, resampled: Sequence[float]) -> Interval:
    """Return a value with the interval that 95 % of the resampled values are in."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high), len(resampled))
