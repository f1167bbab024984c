"""The oracle itself, checked against the contract written out over Python integers."""

from typing import get_args

import pytest
import torch

from tests.rows import DTYPES, KINDS, MODES, as_bits, infinity_bits, make_rows
from topk_megatron.config import Mode
from topk_megatron.ops import TopKArgumentError, topk_mask, topk_mask_with_bits
from topk_megatron.ops.reference import (
    KEYS,
    bits_to_indices_reference,
    count_bits_reference,
    pack_bits,
    topk_mask_reference,
    unpack_bits,
)


def contract_key(raw: int, dtype: torch.dtype, mode: str) -> int:
    """Return the contract's key: sign and magnitude, one zero, one NaN above everything."""
    width = 8 * dtype.itemsize
    magnitude = raw & ((1 << (width - 1)) - 1)
    infinity = infinity_bits(dtype)
    if magnitude > infinity:
        return infinity + 1
    return -magnitude if raw < 0 and mode == "value" else magnitude


def select_by_contract(row: torch.Tensor, k: int, mode: str) -> set[int]:
    keys = [contract_key(int(raw), row.dtype, mode) for raw in as_bits(row)]
    return set(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_contract(kind: str, dtype: torch.dtype, mode: str) -> None:
    x_RH = make_rows(kind, (3, 77), dtype)
    for k in (1, 9, 40, 76, 77):
        y_RH, bits_RW = topk_mask_reference(x_RH, k, mode)
        mask_RH = unpack_bits(bits_RW, 77)
        for x_H, mask_H in zip(x_RH, mask_RH, strict=True):
            assert set(mask_H.nonzero().flatten().tolist()) == select_by_contract(x_H, k, mode)
        assert torch.equal(as_bits(y_RH), as_bits(x_RH) * mask_RH)


@pytest.mark.parametrize("hidden_size", [1, 31, 32, 33, 300])
def test_bits_survive_packing(hidden_size: int) -> None:
    mask = torch.rand(4, hidden_size) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32
    assert bits.shape == (4, (hidden_size + 31) // 32)
    assert torch.equal(unpack_bits(bits, hidden_size), mask)


def test_indices_ascend_and_name_the_set_bits() -> None:
    _, bits = topk_mask_reference(torch.randn(2, 3, 500), 20, "abs")
    indices = bits_to_indices_reference(bits, 500, 20).long()
    assert torch.equal(indices, unpack_bits(bits, 500).nonzero()[:, -1].reshape(2, 3, 20))


@pytest.mark.parametrize("rows", [0, 1, 700])
@pytest.mark.parametrize("hidden_size", [1, 31, 32, 33, 4100])
def test_counts_are_those_of_each_coordinate(hidden_size: int, rows: int) -> None:
    """700 rows of 129 words take two slices."""
    mask = torch.rand(2, rows, hidden_size) < torch.rand(hidden_size)
    counts = count_bits_reference(pack_bits(mask), hidden_size)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, mask.long().sum(dim=(0, 1)))


def test_the_settings_know_the_modes_of_the_operator() -> None:
    assert get_args(Mode) == tuple(KEYS)


def test_a_new_mode_needs_nothing_but_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of ``value`` select by its key, and the gradient is the operator's."""
    with pytest.raises(TopKArgumentError, match="mode must be one of value, abs, got 'smallest'"):
        topk_mask(torch.ones(3), 1, mode="smallest")
    monkeypatch.setitem(KEYS, "smallest", torch.neg)
    x = torch.randn(5, 77, requires_grad=True)
    expected, bits = topk_mask_reference(x.detach(), 9, "smallest")
    y, found = topk_mask_with_bits(x, 9, mode="smallest")
    assert torch.equal(found, bits)
    assert torch.equal(as_bits(y.detach()), as_bits(expected))
    ninth = x.detach().kthvalue(9, dim=-1, keepdim=True).values
    assert torch.equal(unpack_bits(bits, 77), x.detach() <= ninth)
    dy = torch.randn(5, 77)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.where(unpack_bits(bits, 77), dy, 0))
