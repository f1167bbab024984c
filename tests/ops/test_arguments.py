"""Wrong arguments raise TopKArgumentError, which names what came and what is allowed."""

import pytest
import torch

from topk_megatron.ops import (
    TopKArgumentError,
    pack_sparse,
    topk_mask,
    topk_mask_with_bits,
    unpack_sparse,
)
from topk_megatron.ops.api import MAX_HIDDEN_SIZE

X = torch.randn(2, 64)


@pytest.mark.parametrize("function", [topk_mask, topk_mask_with_bits])
@pytest.mark.parametrize(
    ("x", "k", "mode", "message"),
    [
        (X, 0, "value", "k must be at least 1, got 0"),
        (X, -3, "value", "k must be at least 1, got -3"),
        (X.int(), 3, "value", "got torch.int32"),
        (X.bool(), 3, "value", "got torch.bool"),
        (X.to(torch.complex64), 3, "value", "got torch.complex64"),
        (X.to(torch.float8_e4m3fn), 3, "value", "got torch.float8_e4m3fn"),
        (torch.tensor(1.0), 1, "value", "got a scalar"),
        (X, 3, "sum", "mode must be one of value, abs, got 'sum'"),
        (torch.empty(0, MAX_HIDDEN_SIZE + 1), 3, "value", f"at most {MAX_HIDDEN_SIZE}"),
    ],
)
def test_wrong_input_is_named(
    function: object, x: torch.Tensor, k: int, mode: str, message: str
) -> None:
    with pytest.raises(TopKArgumentError, match=message):
        function(x, k, mode=mode)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), r"int32 of shape \(2, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int32), r"int32 of shape \(2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int32, device="meta"), "one device"),
    ],
)
def test_bits_of_another_tensor_are_named(bits: torch.Tensor, message: str) -> None:
    with pytest.raises(TopKArgumentError, match=message):
        pack_sparse(X, bits, 4)


@pytest.mark.parametrize("k", [0, -1, 65])
def test_pack_sparse_names_an_impossible_k(k: int) -> None:
    _, bits = topk_mask_with_bits(X, 4)
    with pytest.raises(TopKArgumentError, match=f"k = {k}"):
        pack_sparse(X, bits, k)


def test_unpack_sparse_names_what_does_not_fit() -> None:
    values, indices = torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.int16)
    with pytest.raises(TopKArgumentError, match="same shape"):
        unpack_sparse(values, indices[:, :3], 64)
    with pytest.raises(TopKArgumentError, match="integer tensor"):
        unpack_sparse(values, values, 64)
    with pytest.raises(TopKArgumentError, match="one device"):
        unpack_sparse(values, indices.to("meta"), 64)
    with pytest.raises(TopKArgumentError, match="hidden_size"):
        unpack_sparse(values, indices, 3)


def test_kernels_refuse_to_read_beyond_their_memory(kernels: None) -> None:
    ops = torch.ops.topk_megatron
    short = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="bits must be int32"):
        ops.topk_mask_backward(X, short)
    with pytest.raises(RuntimeError, match="bits must be int32"):
        ops.bits_to_indices(short, 64, 4)
    with pytest.raises(RuntimeError, match="expected 1 <= k"):
        ops.topk_mask(X, 65, "value")
    with pytest.raises(RuntimeError, match="exactly k"):
        ops.bits_to_indices(torch.full((2, 2), 5, dtype=torch.int32), 64, 3)
