"""The operator: top-k plus mask over the last dimension. Imports nothing of the project."""

from topk_megatron.ops.errors import TopKArgumentError
from topk_megatron.ops.extension import TopKFallbackWarning
from topk_megatron.ops.topk_mask import (
    pack_sparse,
    topk_mask,
    topk_mask_with_bits,
    unpack_sparse,
)

__all__ = [
    "TopKArgumentError",
    "TopKFallbackWarning",
    "pack_sparse",
    "topk_mask",
    "topk_mask_with_bits",
    "unpack_sparse",
]
