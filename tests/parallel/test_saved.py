"""Saved activations: TopK outputs are packed, and expand to the same bits."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from topk_megatron.errors import VerificationError
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.saved import SparseSaver
from topk_megatron.parallel.selection import Selection, SelectionRegistry
from topk_megatron.parallel.verify import Verifier


def gradients(saver: SparseSaver | None, spoil: bool = False) -> list[Tensor]:
    """Gradients through a TopK output that is saved twice, and through an ordinary tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 64, generator=generator, requires_grad=True)
    weight = torch.randn(64, generator=generator, requires_grad=True)
    y, bits = topk_mask_with_bits(x, 4)
    if saver is not None:
        saver.enter()
        saver.selections.remember(y, Selection(y.shape, 4, bits=bits))
    if spoil:
        with torch.no_grad():
            y.mul_(2)  # no longer the tensor that was remembered
    loss = (y.view(12, 64).square() * weight).sum() + (x * x).sum() + (y * weight).sum()
    if saver is not None:
        saver.leave()
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [x.grad, weight.grad]


def test_gradients_are_the_same_bitwise_and_memory_is_counted_once() -> None:
    saver = SparseSaver(SelectionRegistry(), Verifier(every=1))
    saver.verifier.begin(0)
    for got, wanted in zip(gradients(saver), gradients(None), strict=True):
        assert torch.equal(got, wanted)
    assert saver.dense_bytes == 12 * 64 * 4
    assert saver.packed_bytes == 12 * (4 * 4 + 4)  # values, and indices of one byte
    assert saver.verifier.take_counts()["saved activations"] == 1


def test_an_output_that_was_changed_in_place_is_saved_densely() -> None:
    saver = SparseSaver(SelectionRegistry(), Verifier(None))
    for got, wanted in zip(gradients(saver, spoil=True), gradients(None, spoil=True), strict=True):
        assert torch.equal(got, wanted)
    assert saver.packed_bytes == 0


def test_an_outputs_memory_is_released_and_its_next_owner_not_mistaken_for_it() -> None:
    saver = SparseSaver(SelectionRegistry(), Verifier(None))
    saver.enter()
    for number in range(20):
        y, bits = topk_mask_with_bits(torch.randn(100, 64), 4)
        saver.selections.remember(y, Selection(y.shape, 4, bits=bits))
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


def test_a_received_hidden_state_is_released_and_still_gets_its_gradient() -> None:
    y, bits = topk_mask_with_bits(torch.randn(6, 2, 64), 4)
    indices = torch.ops.topk_megatron.bits_to_indices(bits.view(12, 2), 64, 4)
    weight = torch.randn(64, requires_grad=True)
    wanted = y.clone().requires_grad_()
    (wanted.square() * weight).sum().backward()

    received = y.clone().requires_grad_()
    saver = SparseSaver(SelectionRegistry(), Verifier(None))
    saver.selections.remember(received, Selection(y.shape, 4, indices_NK=indices))
    saver.enter(received)
    loss = (received.square() * weight).sum()
    saver.leave()
    assert received.shape == y.shape
    assert received.untyped_storage().nbytes() == 4
    loss.backward()
    assert received.grad is not None
    assert torch.equal(received.grad, wanted.grad)  # pyright: ignore[reportArgumentType]


def test_embedding_output_is_released_and_looked_up_again() -> None:
    table = torch.nn.Embedding(50, 64)
    ids = torch.randint(0, 50, (2, 6))
    weight = torch.randn(64, requires_grad=True)

    def gradient_of(saver: SparseSaver | None) -> tuple[Tensor | None, bool]:
        table.weight.grad = weight.grad = None
        x = table(ids).transpose(0, 1).contiguous()
        if saver is not None:
            lookup = lambda: table(ids).transpose(0, 1).contiguous()  # noqa: E731
            saver.remember_embedding(x, lookup, ids.nbytes)
            saver.enter()
        loss = (x.square() * weight).sum()
        if saver is not None:
            saver.leave()
        storage = StorageWeakRef(x.untyped_storage())
        del x
        gone = storage.expired()
        loss.backward()
        return table.weight.grad, gone

    wanted, kept = gradient_of(None)
    saver = SparseSaver(SelectionRegistry(), Verifier(every=1))
    saver.verifier.begin(0)
    got, gone = gradient_of(saver)
    assert torch.equal(got, wanted)  # pyright: ignore[reportArgumentType]
    assert (kept, gone) == (False, True)
    assert (saver.dense_bytes, saver.packed_bytes) == (12 * 64 * 4, ids.nbytes)


def test_changed_weights_at_the_second_lookup_are_detected() -> None:
    table = torch.nn.Embedding(50, 64)
    ids = torch.randint(0, 50, (6, 2))
    saver = SparseSaver(SelectionRegistry(), Verifier(every=1))
    saver.verifier.begin(0)
    x = table(ids)
    saver.remember_embedding(x, lambda: table(ids), ids.nbytes)
    saver.enter()
    loss = x.square().sum()
    saver.leave()
    with torch.no_grad():
        table.weight.data[int(ids[0, 0])] += 1  # as an optimizer would, behind autograd's back
    with pytest.raises(VerificationError, match="saved activations"):
        loss.backward()
