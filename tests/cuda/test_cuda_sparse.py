"""The kernels for sparse rows, executed thread by thread on CPU, equal their definitions bitwise.

Shape suffixes: R rows, H hidden size, K selected.
"""

import pytest
import torch
from emulated import EmulatedKernels

from tests.rows import as_bits, make_rows
from topk_megatron.ops.reference import (
    bits_to_indices_reference,
    index_dtype,
    pack_bits,
    topk_mask_reference,
    unpack_bits,
)

INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Around a word, a warp's 32 words, and the 16 KiB that a block assembles at a time.
HIDDEN = (1, 31, 32, 33, 250, 1024, 1055, 2048, 4099, 8192)


def selected(hidden: int, k: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits [R, W] with k set in every row, and their indices [R, K]."""
    x_RH = make_rows("normal", (rows, hidden), torch.float32, seed=hidden + k)
    bits = topk_mask_reference(x_RH, k, "value")[1]
    return bits, bits_to_indices_reference(bits, hidden, k)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_indices_are_those_of_the_set_bits(kernels: EmulatedKernels, hidden: int) -> None:
    for k in sorted({1, (hidden + 15) // 16, (hidden + 1) // 2, hidden}):
        bits, wanted_RK = selected(hidden, k)
        for dtype in INDEX_DTYPES:
            if hidden > 256 and dtype == torch.uint8:
                continue
            got_RK = kernels.bits_to_indices(bits, hidden, k, dtype, seed=k)
            assert torch.equal(got_RK, wanted_RK.to(dtype)), (k, dtype)


def test_a_row_with_too_many_or_too_few_bits_stays_within_its_place(
    kernels: EmulatedKernels,
) -> None:
    mask_RH = torch.zeros(3, 100, dtype=torch.bool)
    mask_RH[0, 10:14] = mask_RH[1, 20:29] = mask_RH[2, 90:94] = True
    for seed in range(8):  # in some schedule the next row is there before this one
        indices_RK = kernels.bits_to_indices(pack_bits(mask_RH), 100, 6, torch.int16, seed=seed)
        assert indices_RK.tolist() == [
            [10, 11, 12, 13, 0, 0],
            [20, 21, 22, 23, 24, 25],
            [90, 91, 92, 93, 0, 0],
        ]


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_packing_and_unpacking_move_every_bit(
    kernels: EmulatedKernels, hidden: int, dtype: torch.dtype
) -> None:
    x_RH = make_rows("random_bits", (5, hidden), dtype, seed=hidden)  # signalling NaNs among them
    for k in sorted({1, (hidden + 15) // 16, hidden}):
        bits, indices_RK = selected(hidden, k)
        for index in {index_dtype(hidden), torch.int32, torch.int64}:
            at_RK = indices_RK.to(index)
            values_RK = kernels.gather_row(x_RH, at_RK, seed=k)
            raw_RK = as_bits(x_RH).gather(1, indices_RK.long())
            assert torch.equal(as_bits(values_RK), raw_RK), (k, index)
            dense_RH = kernels.scatter_row(values_RK, at_RK, hidden, seed=k)
            wanted_RH = torch.where(unpack_bits(bits, hidden), as_bits(x_RH), 0)
            assert torch.equal(as_bits(dense_RH), wanted_RH), (k, index)


def test_an_index_outside_the_row_touches_nothing(kernels: EmulatedKernels) -> None:
    values_RK = torch.tensor([[1.0, 2.0, 3.0]])
    indices_RK = torch.tensor([[-1, 3, 8]], dtype=torch.int16)
    dense_RH = kernels.scatter_row(values_RK, indices_RK, 8)
    assert dense_RH.tolist() == [[0, 0, 0, 2, 0, 0, 0, 0]]
    assert kernels.gather_row(dense_RH, indices_RK).tolist() == [[0, 2, 0]]


@pytest.mark.parametrize("hidden", [1, 33, 300])
@pytest.mark.parametrize("rows", [1, 512, 1025])
def test_counts_are_sums_over_rows(kernels: EmulatedKernels, rows: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    mask_RH = torch.rand(rows, hidden, generator=generator) < 0.3
    counts = kernels.count_bits(pack_bits(mask_RH), hidden)
    assert torch.equal(counts, mask_RH.sum(0))
