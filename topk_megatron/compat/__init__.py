"""The device layer: stock Megatron on a GPU, or Megatron on a machine without CUDA."""

from topk_megatron.compat.select import prepare_device

__all__ = ["prepare_device"]
