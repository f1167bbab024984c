"""TopK over a dimension that tensor parallelism splits: exact, by exchanging candidates only.

Rank r holds units r F/p .. (r + 1) F/p - 1 of F. The k largest of all F, ties to the lowest index,
are found in two steps: each rank picks the k largest of its own units, in the same order; then the
k largest of all ranks' candidates are taken. A unit that the first step drops has k better ones on
its own rank and cannot be among the k best of all. Candidates are in ascending index order on every
rank, and ranks are in ascending order, so a tie still goes to the lowest index of all.

Only the candidates' values travel, in the forward pass only: min(k, F/p) numbers per token and
rank.

Shapes: R any leading dimensions, F units of all ranks, P = F / p units of this rank, C candidates
of one rank.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from topk_megatron.ops import topk_mask, topk_mask_with_bits
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import unpack_bits

Gather = Callable[[Tensor], Tensor]


def global_topk_mask(x_RP: Tensor, k: int, *, mode: str, group: dist.ProcessGroup) -> Tensor:
    """Apply `topk_mask` over the last dimension of a tensor that the ranks of `group` split.

    Every rank of the group must call this function, with the same rows in the same order. The
    result and its gradient are bitwise this rank's part of `topk_mask` on the whole tensor.

    Args:
        x_RP: [..., F / p], with the same number of units on each rank.
        k: units kept in every row of F, over all ranks; k >= F is the identity.
        mode: ``value`` or ``abs``.
        group: the tensor-parallel group, its ranks in the order of their units.
    """
    size, rank = group.size(), group.rank()
    if size == 1:
        return topk_mask(x_RP, k, mode=mode)
    return select_globally(x_RP, k, mode, size, rank, lambda values: _all_gather(values, group))


def select_globally(
    x_RP: Tensor, k: int, mode: str, size: int, rank: int, gather: Gather
) -> Tensor:
    """Do what `global_topk_mask` does, with the communication as a parameter.

    Args:
        x_RP: this rank's part of the tensor.
        k: units kept over all ranks.
        mode: ``value`` or ``abs``.
        size: number of ranks.
        rank: this rank's place among them.
        gather: maps this rank's candidates [..., C] to those of all ranks, [..., size * C], in
            rank order.
    """
    width = x_RP.shape[-1]
    if k >= size * width:
        return x_RP
    if k >= width:  # every unit is a candidate
        mask = _own_share(gather(x_RP.detach().contiguous()), k, mode, size, rank)
        return torch.where(mask, x_RP, 0)
    bits = topk_mask_with_bits(x_RP.detach(), k, mode=mode)[1]
    indices_RC = OPS.bits_to_indices(bits, width, k)
    values_RC = OPS.gather_row(x_RP, indices_RC)
    mask = _own_share(gather(values_RC.detach()), k, mode, size, rank)
    return OPS.scatter_row(torch.where(mask, values_RC, 0), indices_RC, width)


def _own_share(all_values: Tensor, k: int, mode: str, size: int, rank: int) -> Tensor:
    """Return which of this rank's candidates are among the k largest of all: bool [..., C]."""
    bits = topk_mask_with_bits(all_values, k, mode=mode)[1]
    return unpack_bits(bits, all_values.shape[-1]).chunk(size, dim=-1)[rank]


def _all_gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [..., C] of each rank into [..., size * C] on every rank."""
    size = group.size()
    gathered = values.new_empty((size, *values.shape))
    # torch 2.14 renamed the function.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.view(-1), values.view(-1), group=group)
    return gathered.movedim(0, -2).reshape(*values.shape[:-1], size * values.shape[-1])


def grouped_topk_mask(x_RP: Tensor, k: int, groups: int, *, mode: str) -> Tensor:
    """Keep the k / groups largest in each of `groups` equal, contiguous parts of every row.

    Under tensor parallelism, `k` and `groups` are this rank's share.

    Args:
        x_RP: [..., P], under tensor parallelism this rank's part.
        k: units kept in every row.
        groups: number of parts; divides k and P.
        mode: ``value`` or ``abs``.
    """
    width = x_RP.shape[-1]
    assert width % groups == 0, (width, groups)
    assert k % groups == 0, (k, groups)
    parts = x_RP.reshape(*x_RP.shape[:-1], groups, width // groups)
    return topk_mask(parts, k // groups, mode=mode).reshape(x_RP.shape)
