"""Translates config.json of dense Hugging Face models into our configuration.

Their weights have the names of `topk_megatron.hf.mapping`. A setting that no table has is an error
that names it, unless it is off.
"""

from typing import Any

from topk_megatron.errors import CheckpointError

Config = dict[str, Any]

_SAME = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "tie_word_embeddings",
    "vocab_size",
)
# Settings that `dense_config` reads.
_READ = (
    "attention_bias",
    "head_dim",
    "initializer_range",
    "mlp_bias",
    "model_type",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
# Settings without effect on a converted model.
_IGNORED = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sliding_window",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
# Settings that must have these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
}
# Settings that follow from the family and not from the file.
_FAMILIES: dict[str, Config] = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
}
# Megatron's constants (rotary_pos_embedding.py, `_apply_scaling`). gpt_config_from_args of
# megatron-core 0.19 does not pass --rope-scaling-factor on, so that the factor is a constant too.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def dense_config(theirs: Config) -> Config:
    """Return the configuration of a dense model of ours that computes the same.

    Args:
        theirs: config.json of a Llama, Qwen2 or Qwen3.

    Raises:
        CheckpointError: the model is of another family, or Megatron lacks one of its settings.
    """
    family = _FAMILIES.get(theirs.get("model_type", ""))
    if family is None:
        raise CheckpointError(
            f"model_type {theirs.get('model_type')!r} is not known to the converter; it takes "
            f"topk_lm (an exported folder) and {', '.join(_FAMILIES)}"
        )
    _check(theirs)
    missing = [name for name in (*_SAME, "rms_norm_eps") if name not in theirs]
    if missing:
        raise CheckpointError(f"its config.json lacks {', '.join(missing)}")
    config = {name: theirs[name] for name in _SAME}
    heads = config["num_attention_heads"]
    bias = bool(theirs.get("attention_bias"))
    config |= {
        "head_dim": theirs.get("head_dim") or config["hidden_size"] // heads,
        "initializer_range": theirs.get("initializer_range", 0.02),
        "normalization": "RMSNorm",
        "norm_eps": theirs["rms_norm_eps"],
        "hidden_act": "silu",
        "gated_mlp": True,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bool(theirs.get("mlp_bias")),
        "attention_dropout": 0.0,
        "partial_rotary_factor": 1.0,
        "rotary_interleaved": False,
        **_rope(theirs),
        **NO_EXPERTS,
        **family,
    }
    return config


NO_EXPERTS: Config = {
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_layers": [],
    "moe_intermediate_size": None,
    "shared_expert_intermediate_size": 0,
    "router_score_function": "softmax",
    "router_pre_softmax": False,
    "router_scaling_factor": None,
    "router_bias": False,
}


def _check(theirs: Config) -> None:
    for name, value in theirs.items():
        if name in _FIXED and value not in _FIXED[name]:
            allowed = " or ".join(map(repr, _FIXED[name]))
            raise CheckpointError(f"its {name} is {value!r}; the converter takes {allowed}")
        if name == "layer_types" and set(value or ()) - {"full_attention"}:
            raise CheckpointError("it has layers without full attention, which are not converted")
        known = name in (*_SAME, *_READ, *_IGNORED, *_FIXED, "layer_types")
        if not known and value not in (None, False, 0, 0.0, "", [], {}):
            raise CheckpointError(
                f"its config.json has {name}={value!r}, which the converter does not know"
            )


def _rope(theirs: Config) -> Config:
    parameters = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    theta = parameters.pop("rope_theta", None) or theirs.get("rope_theta")
    if theta is None:
        raise CheckpointError("its config.json has no rope_theta")
    parameters.pop("partial_rotary_factor", None)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", "default")
    parameters.pop("type", None)
    if kind == "default":
        scaling: Config = {"rope_type": "default"}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": float(parameters["factor"])}
    elif kind == "llama3" and parameters == LLAMA3:
        scaling = {"rope_type": "llama3", **LLAMA3}
    else:
        raise CheckpointError(
            f"its RoPE scaling {kind} with {parameters} is not Megatron's; the converter takes "
            f"default, linear, and llama3 with {LLAMA3}"
        )
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": float(theta)},
    }
