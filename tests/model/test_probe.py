"""Statistics of a layer, checked against their definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from topk_megatron.model.probe import LayerProbe
from topk_megatron.ops import topk_mask

H = 12


def observed(*microbatches: torch.Tensor, k: int = 3, measuring: bool = True) -> LayerProbe:
    probe = LayerProbe(H)
    probe.measuring = measuring
    for hidden in microbatches:
        probe.observe(hidden, topk_mask(hidden, k))
    return probe


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), k=st.integers(1, H - 1))
def test_sums_are_those_of_the_definition(seed: int, rows: int, k: int) -> None:
    hidden = torch.randn(rows, 2, H, generator=torch.Generator().manual_seed(seed))
    nonzero, outputs, kept, norm = observed(hidden, k=k).take_sums(torch.device("cpu")).tolist()
    y = topk_mask(hidden, k)
    assert nonzero == (y != 0).sum()
    assert outputs == hidden.numel()
    torch.testing.assert_close(kept, y.double().square().sum().item(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(norm, hidden.double().square().sum().item(), rtol=1e-5, atol=1e-9)


def test_sums_are_taken_only_in_measured_steps_and_cleared_when_read() -> None:
    hidden = torch.randn(4, H)
    zeros = torch.zeros(4, dtype=torch.float64)
    cpu = torch.device("cpu")
    assert torch.equal(observed(hidden, measuring=False).take_sums(cpu), zeros)
    probe = observed(hidden)
    assert probe.take_sums(cpu).sum() > 0
    assert torch.equal(probe.take_sums(cpu), zeros)


def test_a_neuron_is_silent_since_the_last_step_in_which_it_was_nonzero() -> None:
    probe = LayerProbe(3)

    def step(*fired: float) -> list[int]:
        probe.observe(torch.ones(1, 3), torch.tensor([fired]))
        probe.end_step(100)
        assert probe.silent_tokens is not None
        return probe.silent_tokens.tolist()

    assert step(1.0, 0.0, 0.0) == [0, 100, 100]
    assert step(0.0, -2.0, 0.0) == [100, 0, 200]  # negative values count as firing
    assert step(0.0, 0.0, 0.0) == [200, 100, 300]
    probe.observe(torch.ones(1, 3), torch.tensor([[0.0, 0.0, float("nan")]]))
    assert step(0.0, 0.0, 0.0) == [300, 200, 0]  # over the microbatches of one step


def test_observing_twice_as_recomputation_does_changes_no_ratio() -> None:
    hidden = torch.randn(9, H)
    once = observed(hidden).take_sums(torch.device("cpu"))
    twice = observed(hidden, hidden).take_sums(torch.device("cpu"))
    torch.testing.assert_close(once[0] / once[1], twice[0] / twice[1])
    torch.testing.assert_close(once[2] / once[3], twice[2] / twice[3])
