"""Megatron's flags become a configuration, and a flag without a counterpart is refused by name."""

from argparse import Namespace
from typing import Any

import pytest

from tests.harness.synthetic import synthetic_config
from topk_megatron.errors import CheckpointError
from topk_megatron.hf.flag_mapping import read_config, write_args
from topk_megatron.hf.mapping import TOPK_LM
from topk_megatron.hf.pieces import SPLITS, pieces


def arguments(**changes: Any) -> Namespace:
    return Namespace(**{**write_args(synthetic_config()), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
    ],
)
def test_flags_of_a_dense_model_read_back_as_its_configuration(changes: dict[str, Any]) -> None:
    config = synthetic_config(**changes)
    read = read_config(Namespace(**write_args(config), params_dtype=None))
    assert read == {name: value for name, value in config.items() if name != "vocab_size"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"window_size": (128, 0)}, "window_size=(128, 0)"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0"),
        ({"position_embedding_type": "learned_absolute"}, "it can be 'rope'"),
        ({"some_new_flag": "on"}, "some_new_flag='on', a flag that the converter does not know"),
        ({"moe_new_router": 0.5}, "moe_new_router=0.5, a flag that the converter does not know"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 16.0}, "--rope-scaling-factor 16.0"),
        ({"num_experts": 4, "add_bias_linear": True}, "add_bias_linear=True"),
    ],
)
def test_flag_without_counterpart_is_refused_by_name(
    changes: dict[str, Any], complaint: str
) -> None:
    full = {"params_dtype": None, "moe_router_load_balancing_type": "aux_loss", **changes}
    with pytest.raises(CheckpointError) as error:
        read_config(arguments(**full))
    assert complaint in str(error.value)


def test_missing_argument_is_named() -> None:
    args = arguments()
    delattr(args, "normalization")
    with pytest.raises(CheckpointError, match="normalization"):
        read_config(args)


@pytest.mark.parametrize(
    ("fused", "biases", "activation"),
    [(True, True, "gelu_pytorch_tanh"), (False, True, "gelu"), (True, False, "gelu")],
)
def test_gelu_is_the_approximation_only_where_megatron_fused_it(
    fused: bool, biases: bool, activation: str
) -> None:
    args = arguments(
        swiglu=False, bias_gelu_fusion=fused, add_bias_linear=biases, params_dtype=None
    )
    assert read_config(args)["hidden_act"] == activation


def test_every_row_names_a_split_and_hugging_face_names_are_unique() -> None:
    assert {row.split for row in TOPK_LM} <= set(SPLITS)
    config = synthetic_config(attention_bias=True, mlp_bias=True)
    config |= {"num_experts": 2, "moe_layers": [1], "moe_intermediate_size": 8}
    config |= {"shared_expert_intermediate_size": 8, "router_bias": True, "qk_norm": True}
    names = [name for piece in pieces(config) for name in piece.huggingface]
    assert len(names) == len(set(names))
    assert "model.layers.1.mlp.experts.1.down_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" not in names
