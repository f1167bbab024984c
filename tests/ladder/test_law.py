"""The fit finds the law that made the losses, and the tax is what the laws say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.ladder import law as laws
from examples.ladder.law import Law, Observation
from examples.ladder.rungs import RUNGS

TRUE = Law(1.8, math.log(30), 0.3, math.log(300), 0.35)
DOCUMENTS = 40


def observe(
    law: Law, variant: str = "dense", *, noise: float = 0.0, seeds: int = 3
) -> list[Observation]:
    """Return what the ladder would measure if this were the law."""
    found = []
    text = np.random.default_rng(7)
    counts = text.integers(500, 2500, DOCUMENTS).astype(float)
    hardness = 1 + 0.1 * text.standard_normal(DOCUMENTS)
    hardness *= counts.sum() / (hardness * counts).sum()
    for rung in RUNGS.values():
        for seed in range(1, 1 + (seeds if rung.depth < 9 else 1)):
            luck = np.random.default_rng(1000 * rung.depth + seed)
            for fraction in (0.25, 0.5, 1.0):
                tokens = rung.tokens(fraction)
                loss = law.loss(rung.parameters, tokens) + noise * luck.standard_normal()
                sums = loss * counts * hardness
                where = (variant, rung.depth, seed, rung.parameters, tokens)
                found.append(Observation(*where, sums, counts))
    return found


@settings(max_examples=15)
@given(
    st.floats(0.5, 2.5),
    st.floats(0.15, 0.6),
    st.floats(0.15, 0.6),
    st.floats(0.2, 2),
    st.floats(0.2, 2),
)
def test_the_fit_predicts_the_losses_of_the_law_that_made_them(
    floor: float, alpha: float, beta: float, by_size: float, by_tokens: float
) -> None:
    """The terms are `by_size` and `by_tokens` nats at depth 8."""
    middle = RUNGS[8]
    true = Law(
        floor,
        math.log(by_size) + alpha * math.log(middle.parameters),
        alpha,
        math.log(by_tokens) + beta * math.log(middle.tokens()),
        beta,
    )
    found = laws.fit(observe(true))
    for rung in RUNGS.values():
        sizes = (rung.parameters, rung.tokens())
        assert found.loss(*sizes) == pytest.approx(true.loss(*sizes), abs=2e-3)


def test_constants_are_found_where_the_ladder_determines_them() -> None:
    found = laws.fit(observe(TRUE))
    assert found.floor == pytest.approx(TRUE.floor, abs=0.05)
    assert found.alpha == pytest.approx(TRUE.alpha, abs=0.02)
    assert found.beta == pytest.approx(TRUE.beta, abs=0.02)


def test_one_odd_run_decides_little() -> None:
    some = observe(TRUE, seeds=1)
    odd = some[7]
    some[7] = Observation(
        *("dense", odd.depth, odd.seed, odd.parameters, odd.tokens), odd.losses * 1.1, odd.counts
    )
    found = laws.fit(some)
    sizes = (RUNGS[12].parameters, RUNGS[12].tokens())
    assert found.loss(*sizes) == pytest.approx(TRUE.loss(*sizes), abs=0.01)


def test_the_tax_of_a_model_with_a_higher_loss() -> None:
    other = Law(TRUE.floor + 0.05, *(TRUE.log_a, TRUE.alpha, TRUE.log_b, TRUE.beta))
    assert laws.tax_percent(TRUE, other, 1e6, 2e7) == pytest.approx(100 * math.expm1(0.05))
    assert laws.tax_percent(TRUE, TRUE, 1e6, 2e7) == 0
    assert laws.extra_compute(TRUE, TRUE, 1e6, 2e7) == pytest.approx(1)
    factor = laws.extra_compute(TRUE, other, 1e6, 2e7)
    assert factor > 1
    scale = math.sqrt(factor)
    assert other.loss(1e6 * scale, 2e7 * scale) == pytest.approx(TRUE.loss(1e6, 2e7))


def test_a_loss_out_of_reach_costs_infinite_compute() -> None:
    other = Law(TRUE.loss(1e6, 2e7) + 0.01, *(TRUE.log_a, TRUE.alpha, TRUE.log_b, TRUE.beta))
    assert laws.extra_compute(TRUE, other, 1e6, 2e7) == math.inf


def test_intervals_cover_the_tax_and_pairs_make_them_narrow() -> None:
    """Runs of one seed share their luck, so that the tax is known far better than a loss."""
    other = Law(TRUE.floor + 0.02, *(TRUE.log_a, TRUE.alpha, TRUE.log_b, TRUE.beta))
    observed = {
        "dense": observe(TRUE, noise=0.01),
        "topk": observe(other, "topk", noise=0.01),
    }
    fits = {name: laws.fit(each) for name, each in observed.items()}
    drawn = laws.resampled_laws(observed, fits, resamples=60)
    sizes = (RUNGS[8].parameters, RUNGS[8].tokens())
    true = 100 * math.expm1(0.02)
    tax = laws.interval_of(
        laws.tax_percent(fits["dense"], fits["topk"], *sizes),
        [laws.tax_percent(one["dense"], one["topk"], *sizes) for one in drawn],
    )
    assert tax.low - 0.1 < true < tax.high + 0.1
    assert tax.low < tax.value < tax.high
    losses = [100 * one["dense"].loss(*sizes) for one in drawn]
    assert tax.high - tax.low < np.ptp(losses)


def test_too_few_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="5 constants, but there are 4 losses"):
        laws.fit(observe(TRUE)[:4])


def test_every_leg_of_a_result_is_an_observation(tmp_path: Path) -> None:
    legs = [{"tokens": tokens, "losses": [10.0, 2.0], "counts": [4, 2]} for tokens in (100, 25, 50)]
    run = {"variant": "anneal", "depth": 4, "seed": 2, "parameters": 7, "legs": legs}
    (tmp_path / "one.json").write_text(json.dumps(run))
    found = laws.read_observations(tmp_path.glob("*.json"))
    assert [one.tokens for one in found] == [100, 25, 50]
    assert found[0].losses.sum() / found[0].counts.sum() == 2
    assert (found[0].variant, found[0].depth, found[0].seed) == ("anneal", 4, 2)
