"""Translates Megatron's flags into a Hugging Face configuration and back.

`topk_megatron.checkpoint.flags` knows which flags leave a trained model's function alone. Any other
flag that no table here has is an error that names it, unless it is off (None, False, 0 or empty).
"""

from argparse import Namespace
from typing import Any

from topk_megatron.checkpoint.flags import OTHER_COMPUTATION, OTHER_PARTS, shapes_the_model
from topk_megatron.errors import CheckpointError
from topk_megatron.hf.families import LLAMA3, NO_EXPERTS

Config = dict[str, Any]

# Megatron's flags that become one setting each, unchanged.
DIRECT = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "normalization": "normalization",
    "layernorm_epsilon": "norm_eps",
    "qk_layernorm": "qk_norm",
    "add_bias_linear": "mlp_bias",
    "rotary_percent": "partial_rotary_factor",
    "rotary_interleaved": "rotary_interleaved",
}
# Megatron's flags from which `read_config` computes the other settings.
COMPUTED = (
    "add_qkv_bias",
    "bias_gelu_fusion",
    "group_query_attention",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size",
    "num_experts",
    "num_query_groups",
    "params_dtype",
    "rope_scaling_factor",
    "rotary_base",
    "rotary_seq_len_interpolation_factor",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "use_rope_scaling",
    "use_te_activation_func",
)
# Flags that have no counterpart in the exported model, and the values at which they need none.
REFUSED = {**OTHER_PARTS, **OTHER_COMPUTATION}
_BALANCING = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}


def read_config(args: Namespace) -> Config:
    """Return the exported configuration without vocabulary, tokens and TopK settings.

    Raises:
        CheckpointError: a flag is missing or has no counterpart in the exported model.
    """
    check_flags(args)
    missing = sorted(name for name in (*DIRECT, *COMPUTED) if not hasattr(args, name))
    if missing:
        raise CheckpointError(
            f"the checkpoint's arguments lack {', '.join(missing)}; expected are those of "
            "megatron-core 0.19; use the converter for the version that trained the model"
        )
    config = {theirs: getattr(args, ours) for ours, theirs in DIRECT.items()}
    config["num_key_value_heads"] = (
        args.num_query_groups if args.group_query_attention else args.num_attention_heads
    )
    config["attention_bias"] = bool(args.add_bias_linear or args.add_qkv_bias)
    config["attention_output_bias"] = config["mlp_bias"]
    config["attention_dropout"] = 0.0
    config["tie_word_embeddings"] = not args.untie_embeddings_and_output_weights
    config["gated_mlp"] = bool(args.swiglu)
    config["hidden_act"] = _activation(args)
    return {**config, **_rope(args), **_experts(args, config)}


def write_args(config: Config) -> dict[str, Any]:
    """Return Megatron's arguments for a dense model; the inverse of `read_config`.

    Raises:
        CheckpointError: Megatron's flags cannot express the configuration.
    """
    if config["mlp_bias"] != config["attention_output_bias"]:
        raise CheckpointError(
            "the model has biases in its attention output or in its MLP but not in both; "
            "Megatron's --disable-bias-linear decides about both together"
        )
    if config["rope_theta"] != int(config["rope_theta"]):
        raise CheckpointError(f"rope_theta {config['rope_theta']} is not a whole number")
    scaling = config["rope_parameters"]
    kind = scaling["rope_type"]
    args: dict[str, Any] = {name: values[0] for name, values in REFUSED.items()}
    args |= {ours: config[theirs] for ours, theirs in DIRECT.items()}
    args |= {
        "add_qkv_bias": config["attention_bias"] and not config["mlp_bias"],
        "bias_gelu_fusion": False,
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "swiglu": True,
        "squared_relu": False,
        "rotary_base": int(config["rope_theta"]),
        "use_te_activation_func": False,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": LLAMA3["factor"],
        "rotary_seq_len_interpolation_factor": (
            int(scaling["factor"]) if kind == "linear" else None
        ),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        **_NO_EXPERTS,
    }
    return args


# Megatron's defaults for the flags of experts, for a model that has none.
_NO_EXPERTS: dict[str, Any] = {
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_router_enable_expert_bias": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
}


def check_flags(args: Namespace) -> None:
    """Refuse flags that change the model in ways that the exported model cannot.

    Raises:
        CheckpointError: names the first such flag and the values that can be exported.
    """
    known = {*DIRECT, *COMPUTED, *REFUSED, "topk"}
    for name, value in sorted(vars(args).items()):
        if name in REFUSED and value not in REFUSED[name]:
            allowed = " or ".join(repr(v) for v in REFUSED[name])
            raise CheckpointError(
                f"the checkpoint was trained with {name}={value!r}, which has no counterpart in "
                f"the exported model; it can be {allowed}"
            )
        if name not in known and shapes_the_model(name) and not _is_off(value):
            raise CheckpointError(
                f"the checkpoint was trained with {name}={value!r}, a flag that the converter does "
                "not know; if it has no effect on the trained model, list it in "
                "topk_megatron/checkpoint/flags.py"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _activation(args: Namespace) -> str:
    if args.swiglu:
        return "silu"
    if args.squared_relu:
        return "relu2"
    if args.use_te_activation_func:
        raise CheckpointError(
            "the checkpoint was trained with use_te_activation_func=True, whose GELU is that of "
            "Transformer Engine; only --swiglu and --squared-relu can be exported from there"
        )
    # Megatron's fused bias and GELU is the tanh approximation (fused_bias_gelu.py).
    fused = args.bias_gelu_fusion and args.add_bias_linear
    return "gelu_pytorch_tanh" if fused else "gelu"


def _rope(args: Namespace) -> Config:
    theta = float(args.rotary_base)
    factor = args.rotary_seq_len_interpolation_factor
    scaling: Config = {"rope_type": "default"}
    if args.use_rope_scaling:
        if factor is not None:
            raise CheckpointError(
                "the checkpoint was trained with --use-rope-scaling and with "
                f"--rotary-seq-len-interpolation-factor {factor}; Hugging Face has one or the other"
            )
        if args.rope_scaling_factor != LLAMA3["factor"]:
            raise CheckpointError(
                f"the checkpoint says --rope-scaling-factor {args.rope_scaling_factor}, but "
                f"megatron-core 0.19 trains with {LLAMA3['factor']} whatever the flag says; ask "
                "whoever trained it which of the two is meant"
            )
        scaling = {"rope_type": "llama3", **LLAMA3}
    elif factor is not None:
        scaling = {"rope_type": "linear", "factor": float(factor)}
    old = None if scaling["rope_type"] == "default" else scaling
    return {
        "rope_theta": theta,
        "rope_scaling": old,
        "rope_parameters": {**scaling, "rope_theta": theta},
    }


def _experts(args: Namespace, config: Config) -> Config:
    if args.num_experts is None:
        return dict(NO_EXPERTS)
    _check_routing(args)
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_layers": _moe_layers(args.moe_layer_freq, config["num_hidden_layers"]),
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "router_score_function": args.moe_router_score_function,
        "router_pre_softmax": bool(args.moe_router_pre_softmax),
        "router_scaling_factor": args.moe_router_topk_scaling_factor,
        "router_bias": bool(args.moe_router_enable_expert_bias),
    }


def _check_routing(args: Namespace) -> None:
    if args.add_bias_linear:
        raise CheckpointError(
            "the checkpoint has experts and add_bias_linear=True: Megatron then adds a bias to the "
            "router, which has no counterpart in the exported model; it can be "
            "--disable-bias-linear"
        )
    if args.moe_router_score_function not in ("softmax", "sigmoid"):
        raise CheckpointError(
            f"the checkpoint's --moe-router-score-function {args.moe_router_score_function} has no "
            "counterpart in the exported model; it can be softmax or sigmoid"
        )
    kinds = args.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if odd := sorted(set(kinds) - _BALANCING):
        raise CheckpointError(
            f"the checkpoint's --moe-router-load-balancing-type {odd[0]} chooses experts in a way "
            f"that the exported model does not have; it can be {', '.join(sorted(_BALANCING))}"
        )


def _moe_layers(frequency: int | list[int], num_layers: int) -> list[int]:
    """Megatron's ``--moe-layer-freq``: every Nth layer from the first, or a pattern."""
    if isinstance(frequency, int):
        return [layer for layer in range(num_layers) if layer % frequency == 0]
    if len(frequency) != num_layers:
        raise CheckpointError(
            f"moe_layer_freq has {len(frequency)} entries for {num_layers} layers"
        )
    return [layer for layer, is_moe in enumerate(frequency) if is_moe]
