"""`pack_sparse` and `unpack_sparse` turn a dense row into k values and indices, and back."""

import pytest
import torch

from tests.rows import DTYPES, MODES, as_bits, make_rows
from topk_megatron.ops import pack_sparse, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import (
    bits_to_indices_reference,
    count_bits_reference,
    pack_bits,
    unpack_bits,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "zeros_of_both_signs", "nans", "random_bits"])
def test_a_row_survives_packing_bitwise(kind: str, dtype: torch.dtype, mode: str) -> None:
    for hidden_size in (1, 33, 300, 2048):
        k = max(1, hidden_size // 8)
        x = make_rows(kind, (6, hidden_size), dtype).view(2, 3, hidden_size)
        y, bits = topk_mask_with_bits(x, k, mode=mode)
        values, indices = pack_sparse(y, bits, k)
        assert values.shape == indices.shape == (2, 3, k)
        assert torch.equal(as_bits(unpack_sparse(values, indices, hidden_size)), as_bits(y))


@pytest.mark.parametrize(
    ("hidden_size", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32_768, torch.int16),
        (32_769, torch.int32),
    ],
)
def test_indices_take_the_smallest_type_and_ascend(hidden_size: int, dtype: torch.dtype) -> None:
    k = max(1, hidden_size // 3)
    y, bits = topk_mask_with_bits(torch.randn(2, hidden_size), k)
    _, indices = pack_sparse(y, bits, k)
    assert indices.dtype == dtype
    assert torch.equal(indices, bits_to_indices_reference(bits, hidden_size, k))
    assert torch.equal(indices.long(), unpack_bits(bits, hidden_size).nonzero()[:, 1].reshape(2, k))


def test_the_largest_coordinate_is_within_each_index_type() -> None:
    for hidden_size in (256, 32_768, 65_536):
        x = torch.arange(hidden_size, dtype=torch.float32)[None]
        y, bits = topk_mask_with_bits(x, 2)
        _, indices = pack_sparse(y, bits, 2)
        assert indices.tolist() == [[hidden_size - 2, hidden_size - 1]]


def test_gradients_flow_through_both() -> None:
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    y, bits = topk_mask_with_bits(x, 6)
    values, indices = pack_sparse(y, bits, 6)
    dense = unpack_sparse(values, indices, 40)
    dy = torch.randn(2, 3, 40, dtype=torch.float64)
    (dx,) = torch.autograd.grad(dense, x, dy)
    assert torch.equal(dx, dy * unpack_bits(bits, 40))
    values = values.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: unpack_sparse(v, indices, 40), (values,))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40)])
def test_no_rows_pack_to_no_rows(shape: tuple[int, ...]) -> None:
    y, bits = topk_mask_with_bits(torch.randn(shape), 6)
    values, indices = pack_sparse(y, bits, 6)
    assert values.shape == (*shape[:-1], 6)
    assert unpack_sparse(values, indices, 40).shape == shape


def test_packing_compiles_as_one_graph() -> None:
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        y, bits = topk_mask_with_bits(x, 6)
        return unpack_sparse(*pack_sparse(y, bits, 6), 40)

    x = torch.randn(5, 40)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), round_trip(x))


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("hidden_size", [1, 31, 32, 33, 300, 8192])
def test_counted_bits_equal_the_reference(hidden_size: int, rows: int) -> None:
    """Bits behind the last coordinate count nowhere; 8192 coordinates take several threads."""
    bits = pack_bits(torch.rand(2, rows, hidden_size) < torch.rand(hidden_size))
    if hidden_size % 32:
        bits[..., -1] |= -1 << (hidden_size % 32)
    counts = OPS.count_bits(bits, hidden_size)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, count_bits_reference(bits, hidden_size))
    strided = bits.transpose(0, 1)
    assert torch.equal(OPS.count_bits(strided, hidden_size), counts)


def test_counting_refuses_bits_of_another_size() -> None:
    with pytest.raises(RuntimeError):
        OPS.count_bits(pack_bits(torch.ones(2, 40).bool()), 65)
