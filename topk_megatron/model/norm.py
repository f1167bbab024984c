"""Torch's norms under sequence parallelism.

Megatron's own wrapper refuses sequence parallelism (megatron/core/transformer/torch_norm.py): the
norm's weight sees only this rank's share of the sequence, so its gradient must be summed over
tensor-parallel ranks. Megatron does that for parameters that carry ``sequence_parallel`` (see
`finalize_model_grads`); this norm marks them.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from topk_megatron.errors import ConfigError

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class SequenceParallelNorm:
    """Builds a `torch.nn.LayerNorm` or `RMSNorm` whose parameters are marked sequence parallel.

    Raises:
        ConfigError: a normalisation or an option that torch's norms do not have.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        if config.normalization not in _NORMS:
            raise ConfigError(
                f"--normalization {config.normalization} needs Transformer Engine with "
                f"--sequence-parallel; here it must be one of {', '.join(_NORMS)}"
            )
        for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, option):
                raise ConfigError(f"{option} needs Transformer Engine; drop the flag")
        norm = _NORMS[config.normalization](normalized_shape=hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore
        return norm
