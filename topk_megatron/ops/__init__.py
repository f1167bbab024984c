"""The operator: top-k plus mask over the last dimension. Imports nothing of the project."""

from topk_megatron.ops.api import (
    pack_sparse,
    topk_mask,
    topk_mask_with_bits,
    unpack_sparse,
)
from topk_megatron.ops.errors import TopKArgumentError
from topk_megatron.ops.extension import TopKFallbackWarning

__all__ = [
    "TopKArgumentError",
    "TopKFallbackWarning",
    "pack_sparse",
    "topk_mask",
    "topk_mask_with_bits",
    "unpack_sparse",
]
