"""Statistics of a layer, checked against their definitions."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from topk_megatron.config import TopKConfig
from topk_megatron.model.probe import LayerProbe
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.ops import topk_mask, topk_mask_with_bits
from topk_megatron.ops.reference import pack_bits

H = 12
CPU = torch.device("cpu")


def observed(*microbatches: torch.Tensor, k: int = 3, measuring: bool = True) -> LayerProbe:
    """Observe the microbatches of one step."""
    probe = LayerProbe(H)
    probe.measuring = measuring
    for hidden in microbatches:
        probe.observe(hidden, *topk_mask_with_bits(hidden, k))
    probe.end_step(1)
    return probe


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), k=st.integers(1, H - 1))
def test_sums_are_those_of_the_definition(seed: int, rows: int, k: int) -> None:
    hidden = torch.randn(rows, 2, H, generator=torch.Generator().manual_seed(seed))
    selected, outputs, kept, norm = observed(hidden, k=k).take_sums(CPU).tolist()
    y = topk_mask(hidden, k)
    assert selected == (y != 0).sum()
    assert outputs == hidden.numel()
    torch.testing.assert_close(kept, y.double().square().sum().item(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(norm, hidden.double().square().sum().item(), rtol=1e-5, atol=1e-9)


def test_density_is_counted_and_not_assumed() -> None:
    """A selection with too many neurons shows."""
    probe = LayerProbe(H)
    probe.measuring = True
    ones = torch.ones(2, H)
    probe.observe(ones, ones, pack_bits(torch.arange(H).expand(2, H) < 5))
    probe.end_step(1)
    assert probe.take_sums(CPU)[:2].tolist() == [10, 24]


def test_a_layer_that_keeps_everything_has_no_bits_and_full_density() -> None:
    probe = LayerProbe(H)
    probe.measuring = True
    hidden = torch.randn(5, H)
    probe.observe(hidden, hidden, None)
    probe.end_step(7)
    selected, outputs, kept, norm = probe.take_sums(CPU).tolist()
    assert selected == outputs == hidden.numel()
    assert kept == norm > 0
    assert probe.silent_tokens is not None
    assert not probe.silent_tokens.any()


def test_sums_are_taken_only_in_measured_steps_and_cleared_when_read() -> None:
    hidden = torch.randn(4, H)
    zeros = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(observed(hidden, measuring=False).take_sums(CPU), zeros)
    probe = observed(hidden)
    assert probe.take_sums(CPU).sum() > 0
    assert torch.equal(probe.take_sums(CPU), zeros)


def test_a_step_does_not_see_the_one_before_it() -> None:
    hidden = torch.randn(4, H)
    probe = observed(hidden, hidden)
    first = probe.take_sums(CPU)
    probe.observe(hidden, *topk_mask_with_bits(hidden, 3))
    probe.end_step(1)
    torch.testing.assert_close(2 * probe.take_sums(CPU), first)


def test_a_neuron_is_silent_since_the_last_step_in_which_it_was_selected() -> None:
    probe = LayerProbe(3)
    zeros = torch.zeros(1, 3)

    def observe(*selected: int) -> None:
        probe.observe(zeros, zeros, pack_bits(torch.tensor([selected]).bool()))

    def step(*selected: int) -> list[int]:
        observe(*selected)
        probe.end_step(100)
        assert probe.silent_tokens is not None
        return probe.silent_tokens.tolist()

    assert step(1, 0, 0) == [0, 100, 100]
    assert step(0, 1, 0) == [100, 0, 200]
    assert step(0, 0, 0) == [200, 100, 300]
    observe(0, 0, 1)
    assert step(0, 0, 0) == [300, 200, 0]  # over the microbatches of one step


def runtime() -> TopKRuntime:
    made = TopKRuntime(TopKConfig(hidden_size=H, num_layers=1, k=3, layers=(0,)))
    made.register(0)
    made.begin_step(0, measuring=True)
    return made


def test_a_recomputed_microbatch_is_observed_once() -> None:
    """Megatron's recomputation is reentrant, as this one is: its first pass has no gradients."""
    topk, hidden = runtime(), torch.randn(5, H, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return topk.apply(x * 2, 0, training=True)

    output = checkpoint(layer, hidden, use_reentrant=True)
    output.sum().backward()  # pyright: ignore
    assert topk.applications[True]["residual stream", 0] == 2
    probe = topk.probes[0]
    assert probe.num_rows == 5
    assert probe.counts is not None
    assert probe.counts.sum() == 5 * 3
    plain = runtime()
    plain.apply(hidden * 2, 0, training=True)
    probe.end_step(1)
    plain.probes[0].end_step(1)
    assert torch.equal(probe.take_sums(CPU), plain.probes[0].take_sums(CPU))


def evaluate(topk: TopKRuntime, hidden: torch.Tensor) -> None:
    topk.apply(hidden, 0, training=False)


def do_not_keep_gradients(topk: TopKRuntime, hidden: torch.Tensor) -> None:
    with torch.no_grad():
        topk.apply(hidden, 0, training=True)


@pytest.mark.parametrize("run", [evaluate, do_not_keep_gradients])
def test_passes_that_train_nothing_are_not_observed(
    run: Callable[[TopKRuntime, torch.Tensor], None],
) -> None:
    topk = runtime()
    run(topk, torch.randn(5, H))
    assert topk.probes[0].num_rows == 0


def test_observing_never_waits_for_the_device() -> None:
    """Fake tensors have no values: reading one back, or a shape that depends on one, raises."""
    with FakeTensorMode():
        topk = runtime()
        for _ in range(2):
            topk.apply(torch.randn(5, H, requires_grad=True), 0, training=True)
            topk.probes[0].end_step(10)
        assert topk.probes[0].take_sums(CPU).shape == (4,)
        with pytest.raises(RuntimeError):  # the check can fail
            topk.probes[0].take_sums(CPU).sum().item()
