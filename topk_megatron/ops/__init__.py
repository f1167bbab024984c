"""The operator: top-k plus mask over the last dimension. Imports torch and nothing else of ours."""

from topk_megatron.ops.errors import TopKArgumentError
from topk_megatron.ops.topk_mask import topk_mask, topk_mask_with_bits

__all__ = ["TopKArgumentError", "topk_mask", "topk_mask_with_bits"]
