"""Tiny models of every family that a configuration can describe, with random weights."""

from pathlib import Path
from typing import Any

import torch

from topk_megatron.hf.modeling.modeling_topk import TopKLMConfig, TopKLMForCausalLM
from topk_megatron.hf.tokenizer_export import export_tokenizer

HIDDEN, VOCAB, K = 64, 97, 8
TOPK = {
    "site": "residual",
    "k": K,
    "layers": [0, 1],
    "mode": "value",
    "mlp_k": None,
    "mlp_groups": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    "default": {},
    "dense": {"topk": {**TOPK, "layers": []}},
    "abs": {"topk": {**TOPK, "mode": "abs"}},
    "grouped-queries": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "gelu-layernorm-biases": {
        "normalization": "LayerNorm",
        "hidden_act": "gelu",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "squared-relu": {"hidden_act": "relu2", "gated_mlp": False},
    "qk-norm": {"qk_norm": True},
    "interleaved-partial-rope": {"rotary_interleaved": True, "partial_rotary_factor": 0.5},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "experts": MOE,
    "experts-shared-sigmoid": {
        **MOE,
        "router_score_function": "sigmoid",
        "router_bias": True,
        "router_scaling_factor": 2.5,
        "shared_expert_intermediate_size": 48,
        "mlp_bias": True,
    },
    "mlp-site": {"topk": {**TOPK, "site": "mlp", "mlp_k": 12}},
    "both-sites-groups": {"topk": {**TOPK, "site": "both", "mlp_k": 12, "mlp_groups": 4}},
}


def make_config(**changes: Any) -> TopKLMConfig:
    """A three-layer configuration with these changes."""
    settings: dict[str, Any] = {
        "topk": TOPK,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_theta": 500.0,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return TopKLMConfig(**{**settings, **changes})


def make_model(family: str = "default") -> Any:
    """A TopKLMForCausalLM of the family (its `generate` has no type), ready to evaluate.

    Every weight differs from its initial constant.
    """
    torch.manual_seed(0)
    model = TopKLMForCausalLM(make_config(**FAMILIES[family])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "inv_freq" not in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def make_tokens(rows: int = 2, length: int = 10) -> torch.Tensor:
    """Token numbers [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def make_folder(directory: Path, tokenizer: Path, family: str = "default", **changes: Any) -> Path:
    """An exported folder with random weights and a real tokenizer, made without Megatron."""
    directory.mkdir(parents=True)
    length = changes.setdefault("max_position_embeddings", 64)
    tokens = export_tokenizer("SentencePieceTokenizer", str(tokenizer), directory, length)
    torch.manual_seed(0)
    config = make_config(**{**FAMILIES[family], **tokens, **changes})
    TopKLMForCausalLM(config).save_pretrained(directory)
    return directory
