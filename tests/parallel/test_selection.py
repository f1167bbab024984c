"""The registry recognises the whole, unchanged output of a TopK and nothing else."""

import numpy as np
import pytest
import torch
from torch import Tensor

from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.selection import Selection, SelectionRegistry


def registered(rows: int = 6) -> tuple[SelectionRegistry, Tensor, Selection]:
    registry = SelectionRegistry()
    output, bits = topk_mask_with_bits(torch.randn(rows, 2, 64), 4)
    selection = Selection(output.shape, 4, bits=bits)
    registry.remember(output, selection)
    return registry, output, selection


def test_the_output_and_its_views_are_recognised() -> None:
    registry, output, selection = registered()
    for alias in (output, output.view(12, 64), output.detach(), output.view(-1)):
        assert registry.of(alias) is selection


def test_parts_copies_and_other_readings_of_the_memory_are_not() -> None:
    registry, output, _ = registered()
    others = (
        output[:1],
        output[1:],
        output.transpose(0, 1),
        output.clone(),
        output.view(torch.int32),
        output.half(),
    )
    for other in others:
        assert registry.of(other) is None


def test_a_changed_output_is_not_recognised() -> None:
    registry, output, _ = registered()
    output.add_(1)
    assert registry.of(output) is None


def test_memory_that_was_freed_and_used_again_is_not_recognised() -> None:
    memory = np.zeros((100, 64), np.float32)
    output, bits = torch.from_numpy(memory), torch.zeros(100, 2, dtype=torch.int32)
    registry = SelectionRegistry()
    registry.remember(output, Selection(output.shape, 4, bits=bits))
    assert registry.of(output) is not None
    address = output.data_ptr()
    del output
    other = torch.from_numpy(memory)
    assert other.data_ptr() == address
    assert registry.of(other) is None


def test_selections_of_freed_outputs_are_forgotten() -> None:
    """Bitmasks must not pile up over the microbatches of a step."""
    registry = SelectionRegistry()
    for _ in range(20):
        output, bits = topk_mask_with_bits(torch.randn(100, 64), 4)
        registry.remember(output, Selection(output.shape, 4, bits=bits))
        del output
    assert len(registry._entries) <= 2
    registry.clear()
    assert not registry._entries


def test_bitmask_and_indices_agree() -> None:
    _, output, selection = registered()
    indices = selection.indices_NK()
    expected = output.view(12, 64).nonzero()[:, 1].view(12, 4)
    assert torch.equal(indices.long(), expected)
    arrived = Selection(output.shape, 4, indices_NK=indices)
    assert arrived.bits_NW is None
    assert arrived.indices_NK() is indices
    with pytest.raises(AssertionError):
        Selection(output.shape, 4)
