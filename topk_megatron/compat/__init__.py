"""Where the model runs: a GPU through Megatron as it is, or a machine without CUDA."""

from topk_megatron.compat.select import prepare_device

__all__ = ["prepare_device"]
