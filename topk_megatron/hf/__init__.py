"""TopK language models as Hugging Face models: conversion from and to Megatron's checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topk_megatron.hf.modeling.activation_topk import Intervention

__all__ = ["Intervention"]


def __getattr__(name: str) -> Any:
    # Not at import: the converter's command line need not wait for torch and transformers.
    if name == "Intervention":
        from topk_megatron.hf.modeling.activation_topk import Intervention

        return Intervention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
