"""The operator: top-k plus mask over the last dimension. It imports nothing else of the project."""

from topk_megatron.ops.api import (
    pack_sparse,
    topk_mask,
    topk_mask_with_bits,
    unpack_sparse,
)
from topk_megatron.ops.extension import TopKFallbackWarning
from topk_megatron.ops.library import TopKArgumentError

__all__ = [
    "TopKArgumentError",
    "TopKFallbackWarning",
    "pack_sparse",
    "topk_mask",
    "topk_mask_with_bits",
    "unpack_sparse",
]
