"""The tensor-parallel selection on simulated ranks equals the selection on one rank bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rows import KINDS, MODES, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference
from topk_megatron.parallel.tensor import grouped_topk_mask, select_globally


def on_ranks(x: Tensor, k: int, mode: str, size: int) -> tuple[list[Tensor], list[int]]:
    """Return each rank's result, and how many candidates per row it sent.

    Ranks run one after another, twice: first to offer their candidates, then to select.
    """
    shards = x.chunk(size, dim=-1)
    offered: list[Tensor] = []

    def offer(values: Tensor) -> Tensor:
        offered.append(values)
        raise _OfferedError

    for rank, shard in enumerate(shards):
        try:
            return [shard], [0] if select_globally(
                shard, k, mode, size, rank, offer
            ) is shard else []
        except _OfferedError:
            continue
    gathered = torch.cat(offered, dim=-1)
    results = [
        select_globally(shard, k, mode, size, rank, lambda _: gathered)
        for rank, shard in enumerate(shards)
    ]
    return results, [values.shape[-1] for values in offered]


class _OfferedError(Exception):
    pass


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mode=st.sampled_from(MODES),
    size=st.sampled_from([2, 3, 4, 8]),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_ranks_together_select_what_one_rank_selects(
    kind: str, dtype: torch.dtype, mode: str, size: int, width: int, share: float, seed: int
) -> None:
    hidden = size * width
    k = max(1, round(share * hidden))
    x = make_rows(kind, (3, hidden), dtype, seed)
    results, sent = on_ranks(x, k, mode, size)
    if k >= hidden:
        assert sent == [0]
        return
    wanted = topk_mask_reference(x, k, mode)[0]
    assert torch.equal(as_bits(torch.cat(results, dim=-1)), as_bits(wanted))
    assert set(sent) == {min(k, width)}


@pytest.mark.parametrize("size", [2, 4])
def test_ties_across_ranks_go_to_the_lowest_index_of_all(size: int) -> None:
    x = torch.ones(1, 32)
    results, _ = on_ranks(x, 9, "value", size)
    assert torch.cat(results, dim=-1)[0].tolist() == [1.0] * 9 + [0.0] * 23


@pytest.mark.parametrize("k", [3, 5, 9])
def test_gradient_is_dy_on_the_selected_units_also_where_they_are_zero(k: int) -> None:
    x = torch.tensor([[0.0, -0.0, -1.0, -1.0, 0.0, -1.0, -2.0, 0.0, 0.0, -3.0]])
    dy = torch.arange(1.0, 11.0)[None]
    shards = [shard.clone().requires_grad_() for shard in x.chunk(2, dim=-1)]
    width = min(k, 5)
    offers = [topk_candidates(shard, width) for shard in x.chunk(2, dim=-1)]
    for rank, shard in enumerate(shards):
        y = select_globally(shard, k, "value", 2, rank, lambda _: torch.cat(offers, dim=-1))
        y.backward(dy.chunk(2, dim=-1)[rank])
    gradient = torch.cat([shard.grad for shard in shards], dim=-1)  # pyright: ignore
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices[0, :k]
    wanted = torch.zeros_like(x)
    wanted[0, order] = dy[0, order]
    assert torch.equal(gradient, wanted)


def topk_candidates(shard: Tensor, count: int) -> Tensor:
    """Return the largest `count` by definition, in ascending index order."""
    order = torch.sort(shard, dim=-1, descending=True, stable=True).indices[..., :count]
    return shard.gather(-1, order.sort(dim=-1).values)


@given(
    groups=st.sampled_from([2, 4, 8]),
    share=st.integers(1, 6),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(KINDS),
)
def test_groups_are_the_same_model_on_every_tensor_parallel_size(
    groups: int, share: int, mode: str, kind: str
) -> None:
    x = make_rows(kind, (3, groups * 6), torch.float32)
    k = groups * share
    parts = [topk_mask_reference(part, share, mode)[0] for part in x.chunk(groups, dim=-1)]
    wanted = as_bits(torch.cat(parts, dim=-1))
    for size in (1, 2, groups):
        shards = [
            grouped_topk_mask(shard, k // size, groups // size, mode=mode)
            for shard in x.chunk(size, dim=-1)
        ]
        assert torch.equal(as_bits(torch.cat(shards, dim=-1)), wanted)
