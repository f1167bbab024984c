"""The loss of a step is checked without a wait for the device in every microbatch."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch

from topk_megatron.errors import RunError
from topk_megatron.train import schedule, step


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    args = Namespace(
        check_for_nan_in_loss_and_grad=True,
        check_for_spiky_loss=False,
        rerun_mode="disabled",
        iteration=4,
        curr_iteration=6,
        rank=3,
        save="run",
    )
    monkeypatch.setattr(step, "get_args", lambda: args)
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: None)
    monkeypatch.setattr(step, "_unread", [])
    return args


def reduce(loss: float | torch.Tensor) -> None:
    output = torch.as_tensor(loss, dtype=torch.float32).reshape(1, 1)
    step.reduce_loss(torch.ones_like(output), output)


def test_a_microbatch_does_not_read_its_loss() -> None:
    """A tensor on the meta device has no value to read."""
    reduce(torch.empty(1, 1, device="meta"))
    with pytest.raises(NotImplementedError):
        step.check_losses()


def test_all_microbatches_of_a_step_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    tolist: Any = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x.numel()) or tolist(x))
    for _ in range(5):
        reduce(2.0)
    step.check_losses()
    assert reads == [5]
    step.check_losses()
    assert reads == [5]


@pytest.mark.parametrize(("loss", "word"), [(math.nan, "NaN"), (-math.inf, "infinite")])
@pytest.mark.parametrize("place", [0, 2])
def test_a_loss_that_is_not_finite_ends_the_step(place: int, loss: float, word: str) -> None:
    for microbatch in range(3):
        reduce(loss if microbatch == place else 1.0)
    with pytest.raises(RunError, match=rf"iteration 7: the loss of rank 3 .* is {word}; .* --load"):
        step.check_losses()
    step.check_losses()  # nothing is left over for the next step


def runs(*losses: float, error: str | None = None) -> Callable[..., str]:
    """Return a schedule that has these losses and then perhaps fails."""

    def run(*_: Any, **__: Any) -> str:
        for loss in losses:
            reduce(loss)
        if error is not None:
            raise RuntimeError(error)
        return "result"

    return run


def test_the_schedule_is_checked_before_it_returns() -> None:
    assert schedule._run_checked(runs(1.0, 2.0)) == "result"
    with pytest.raises(RunError, match="is NaN"):
        schedule._run_checked(runs(1.0, math.nan))


def test_the_loss_explains_what_megatron_says_about_its_gradients() -> None:
    with pytest.raises(RunError, match="is NaN"):
        schedule._run_checked(runs(math.nan, error="found NaN in local grad norm for bucket #0"))
    with pytest.raises(RuntimeError, match="bucket #0"):
        schedule._run_checked(runs(1.0, error="found NaN in local grad norm for bucket #0"))


def test_without_the_check_nothing_is_read(arguments: Namespace) -> None:
    arguments.check_for_nan_in_loss_and_grad = False
    reduce(math.nan)
    step.check_losses()
