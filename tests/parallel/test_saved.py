"""Saved activations: packed where they are TopK outputs, bitwise the same when they come back."""

import torch
from torch import Tensor

from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.saved import SparseSaver
from topk_megatron.parallel.verify import Verifier


def gradients(saver: SparseSaver | None, spoil: bool = False) -> list[Tensor]:
    """A TopK, saved twice by what follows, and a tensor that is none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 64, generator=generator, requires_grad=True)
    weight = torch.randn(64, generator=generator, requires_grad=True)
    y, bits = topk_mask_with_bits(x, 4)
    if saver is not None:
        saver.enter()
        saver.remember(y, bits, 4)
    if spoil:
        with torch.no_grad():
            y.mul_(2)  # no longer what was remembered
    loss = (y.view(12, 64).square() * weight).sum() + (x * x).sum() + (y * weight).sum()
    if saver is not None:
        saver.leave()
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [x.grad, weight.grad]


def test_gradients_are_the_same_bitwise_and_memory_is_counted_once() -> None:
    saver = SparseSaver(Verifier(every=1))
    saver.verifier.begin(0)
    for got, wanted in zip(gradients(saver), gradients(None), strict=True):
        assert torch.equal(got, wanted)
    assert saver.dense_bytes == 12 * 64 * 4
    assert saver.packed_bytes == 12 * (4 * 4 + 64 // 8)
    assert saver.verifier.take_counts()["saved activations"] == 1


def test_an_output_that_was_changed_in_place_is_saved_as_it_is() -> None:
    saver = SparseSaver(Verifier(None))
    for got, wanted in zip(gradients(saver, spoil=True), gradients(None, spoil=True), strict=True):
        assert torch.equal(got, wanted)
    assert saver.packed_bytes == 0


def test_memory_of_an_output_is_released_and_its_successor_not_mistaken_for_it() -> None:
    saver = SparseSaver(Verifier(None))
    saver.enter()
    for number in range(20):
        y, bits = topk_mask_with_bits(torch.randn(100, 64), 4)
        saver.remember(y, bits, 4)
        pointer = y.data_ptr()
        del y
        other = torch.full((100, 64), float(number), requires_grad=True)
        product = other * other
        if other.data_ptr() == pointer:
            product.sum().backward()
            assert other.grad is not None
            assert torch.equal(other.grad, 2 * other.detach())
    saver.leave()
    assert saver.packed_bytes == 0
