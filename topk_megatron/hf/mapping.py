"""The names of weights in Megatron and in Hugging Face, as one table for both directions.

A row names a Megatron tensor, the Hugging Face tensors that it becomes, how it is cut into them,
its shape, and which models have it. Names are written out, so that a text search finds them; they
may contain {layer} and {expert}. Shapes are words to which `topk_megatron.hf.pieces.sizes` gives
numbers. Legend: fc1 and fc2 are the two matrices of an MLP; a gated MLP's fc1 is [gate; up]. The
rows of linear_qkv are ordered by key-value group: its queries, its key, its value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Where = Literal["model", "layer", "dense layer", "moe layer", "expert"]
Config = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        megatron: key in the checkpoint; for a layer, the part after ``decoder.layers.N.``.
        huggingface: names of the tensors that it becomes, in order.
        shape: dimensions of the Megatron tensor of one layer (and one expert), in words.
        split: how the tensor is cut; a key of `topk_megatron.hf.pieces.SPLITS`.
        where: the part of the model that has it.
        when: the models that have it; a key of `CONDITIONS`.
        alias: the key under which other layer specs write the same tensor.
        buffer: whether it keeps its dtype when the weights are converted to another one.
    """

    megatron: str
    huggingface: tuple[str, ...]
    shape: tuple[str, ...]
    split: str = "copy"
    where: Where = "layer"
    when: str = "always"
    alias: str | None = None
    buffer: bool = False


CONDITIONS: dict[str, Callable[[Config], bool]] = {
    "always": lambda c: True,
    "layer norm": lambda c: c["normalization"] == "LayerNorm",
    "untied": lambda c: not c["tie_word_embeddings"],
    "qkv bias": lambda c: c["attention_bias"],
    "output bias": lambda c: c["attention_output_bias"],
    "mlp bias": lambda c: c["mlp_bias"],
    "qk norm": lambda c: c["qk_norm"],
    "qk layer norm": lambda c: c["qk_norm"] and c["normalization"] == "LayerNorm",
    "gated": lambda c: c["gated_mlp"],
    "not gated": lambda c: not c["gated_mlp"],
    "gated, bias": lambda c: c["gated_mlp"] and c["mlp_bias"],
    "not gated, bias": lambda c: not c["gated_mlp"] and c["mlp_bias"],
    "router bias": lambda c: c["router_bias"],
    "shared, gated": lambda c: c["shared_expert_intermediate_size"] > 0 and c["gated_mlp"],
    "shared, not gated": lambda c: c["shared_expert_intermediate_size"] > 0 and not c["gated_mlp"],
    "shared": lambda c: c["shared_expert_intermediate_size"] > 0,
}


# Hugging Face's Llama names; every export uses this table.
TOPK_LM: tuple[Row, ...] = (
    Row(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ("vocabulary", "hidden"),
        split="vocabulary",
        where="model",
    ),
    Row(
        "self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        ("hidden",),
        alias="input_layernorm.weight",
    ),
    Row(
        "self_attention.linear_qkv.layer_norm_bias",
        ("model.layers.{layer}.input_layernorm.bias",),
        ("hidden",),
        when="layer norm",
        alias="input_layernorm.bias",
    ),
    Row(
        "self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        ("qkv", "hidden"),
        split="qkv",
    ),
    Row(
        "self_attention.linear_qkv.bias",
        (
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ),
        ("qkv",),
        split="qkv",
        when="qkv bias",
    ),
    Row(
        "self_attention.q_layernorm.weight",
        ("model.layers.{layer}.self_attn.q_norm.weight",),
        ("head",),
        when="qk norm",
    ),
    Row(
        "self_attention.q_layernorm.bias",
        ("model.layers.{layer}.self_attn.q_norm.bias",),
        ("head",),
        when="qk layer norm",
    ),
    Row(
        "self_attention.k_layernorm.weight",
        ("model.layers.{layer}.self_attn.k_norm.weight",),
        ("head",),
        when="qk norm",
    ),
    Row(
        "self_attention.k_layernorm.bias",
        ("model.layers.{layer}.self_attn.k_norm.bias",),
        ("head",),
        when="qk layer norm",
    ),
    Row(
        "self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
        ("hidden", "heads"),
    ),
    Row(
        "self_attention.linear_proj.bias",
        ("model.layers.{layer}.self_attn.o_proj.bias",),
        ("hidden",),
        when="output bias",
    ),
    Row(
        "mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        ("hidden",),
        alias="pre_mlp_layernorm.weight",
    ),
    Row(
        "mlp.linear_fc1.layer_norm_bias",
        ("model.layers.{layer}.post_attention_layernorm.bias",),
        ("hidden",),
        when="layer norm",
        alias="pre_mlp_layernorm.bias",
    ),
    Row(
        "mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        ("2 ffn", "hidden"),
        split="gate and up",
        where="dense layer",
        when="gated",
    ),
    Row(
        "mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.up_proj.weight",),
        ("ffn", "hidden"),
        where="dense layer",
        when="not gated",
    ),
    Row(
        "mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",),
        ("hidden", "ffn"),
        where="dense layer",
    ),
    Row(
        "mlp.linear_fc1.bias",
        ("model.layers.{layer}.mlp.gate_proj.bias", "model.layers.{layer}.mlp.up_proj.bias"),
        ("2 ffn",),
        split="gate and up",
        where="dense layer",
        when="gated, bias",
    ),
    Row(
        "mlp.linear_fc1.bias",
        ("model.layers.{layer}.mlp.up_proj.bias",),
        ("ffn",),
        where="dense layer",
        when="not gated, bias",
    ),
    Row(
        "mlp.linear_fc2.bias",
        ("model.layers.{layer}.mlp.down_proj.bias",),
        ("hidden",),
        where="dense layer",
        when="mlp bias",
    ),
    Row(
        "mlp.router.weight",
        ("model.layers.{layer}.mlp.gate.weight",),
        ("experts", "hidden"),
        where="moe layer",
    ),
    Row(
        "mlp.router.expert_bias",
        ("model.layers.{layer}.mlp.gate.expert_bias",),
        ("experts",),
        where="moe layer",
        when="router bias",
        buffer=True,
    ),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        (
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ),
        ("2 expert ffn", "hidden"),
        split="gate and up",
        where="expert",
        when="gated",
    ),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",),
        ("expert ffn", "hidden"),
        where="expert",
        when="not gated",
    ),
    Row(
        "mlp.experts.experts.linear_fc2.weight",
        ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
        ("hidden", "expert ffn"),
        where="expert",
    ),
    Row(
        "mlp.experts.experts.linear_fc1.bias",
        (
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.bias",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.bias",
        ),
        ("2 expert ffn",),
        split="gate and up",
        where="expert",
        when="gated, bias",
    ),
    Row(
        "mlp.experts.experts.linear_fc1.bias",
        ("model.layers.{layer}.mlp.experts.{expert}.up_proj.bias",),
        ("expert ffn",),
        where="expert",
        when="not gated, bias",
    ),
    Row(
        "mlp.experts.experts.linear_fc2.bias",
        ("model.layers.{layer}.mlp.experts.{expert}.down_proj.bias",),
        ("hidden",),
        where="expert",
        when="mlp bias",
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        (
            "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
            "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
        ),
        ("2 shared ffn", "hidden"),
        split="gate and up",
        where="moe layer",
        when="shared, gated",
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        ("model.layers.{layer}.mlp.shared_expert.up_proj.weight",),
        ("shared ffn", "hidden"),
        where="moe layer",
        when="shared, not gated",
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        ("model.layers.{layer}.mlp.shared_expert.down_proj.weight",),
        ("hidden", "shared ffn"),
        where="moe layer",
        when="shared",
    ),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",), where="model"),
    Row(
        "decoder.final_layernorm.bias",
        ("model.norm.bias",),
        ("hidden",),
        where="model",
        when="layer norm",
    ),
    Row(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocabulary", "hidden"),
        split="vocabulary",
        where="model",
        when="untied",
    ),
)

# How the keys of a checkpoint begin that do not belong to the model.
NOT_THE_MODEL = ("optimizer", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
# The state of Transformer Engine's modules (scales of fp8); empty in Megatron's own modules.
EXTRA_STATE = "._extra_state"
