"""Which neurons survive: topk_megatron's fused operator where it is installed, else its definition.

S holds the k coordinates of the last dimension with the largest key (the value, or its magnitude);
ties go to the lowest index, +0 and -0 are equal, NaN is larger than everything. Both ways select
the same S and leave the survivors bitwise unchanged.
"""

import torch
from torch import Tensor

try:
    from topk_megatron.ops import pack_sparse, topk_mask, topk_mask_with_bits
except ImportError:
    pack_sparse = topk_mask = topk_mask_with_bits = None

FUSED = topk_mask is not None
# The selection modes: the key that is compared.
KEYS = {"value": lambda x: x, "abs": torch.abs}


def select(x: Tensor, k: int, mode: str) -> Tensor:
    """Return x [..., H] with all but the k largest coordinates of each row set to +0."""
    if k >= x.shape[-1]:
        return x
    if topk_mask is not None:
        return topk_mask(x, k, mode=mode)
    return _keep(x, _top(x, k, mode))


def select_with_indices(x: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return what `select` does, and S as int64 indices [..., min(k, H)], ascending per row."""
    size = x.shape[-1]
    if k >= size:
        return x, torch.arange(size, device=x.device).expand(x.shape)
    if topk_mask_with_bits is not None and pack_sparse is not None:
        y, bits = topk_mask_with_bits(x, k, mode=mode)
        return y, pack_sparse(y.detach(), bits, k)[1].long()
    top = _top(x, k, mode)
    return _keep(x, top), top.sort(dim=-1).values


def _top(x: Tensor, k: int, mode: str) -> Tensor:
    # torch.topk breaks ties differently on each device; a stable sort does not.
    return torch.sort(KEYS[mode](x.detach()), dim=-1, descending=True, stable=True).indices[..., :k]


def _keep(x: Tensor, indices: Tensor) -> Tensor:
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices, True)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
