"""The layer classes of the final spec; no test here needs a process group."""

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
)

from topk_megatron.config import TopKConfig, parse_layers
from topk_megatron.model import spec as spec_module
from topk_megatron.model.attention import FusedAttention
from topk_megatron.model.layer import TopKTransformerLayer, with_topk
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.model.spec import SequenceParallelNorm, topk_layer_spec

LAYERS = 6


def runtime(layers: str) -> TopKRuntime:
    chosen = parse_layers(layers, LAYERS)
    return TopKRuntime(TopKConfig(hidden_size=8, num_layers=LAYERS, k=2, layers=chosen))


def model_config(backend: str = "auto") -> Any:
    transformer = SimpleNamespace(
        sequence_parallel=False,
        attention_backend=AttnBackend[backend],
        softmax_type="vanilla",
        multi_latent_attention=False,
        experimental_attention_variant=None,
        batch_invariant_mode=False,
        pipeline_model_parallel_layout=None,
    )
    return SimpleNamespace(transformer=transformer)


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers on one stage, without Megatron's process groups."""
    monkeypatch.setattr(spec_module, "get_num_layers_to_build", lambda *_: LAYERS)
    monkeypatch.setattr(spec_module, "get_transformer_layer_offset", lambda *_: 0)


@pytest.fixture
def second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two pipeline stages."""
    monkeypatch.setattr(spec_module, "get_num_layers_to_build", lambda *_: LAYERS // 2)
    monkeypatch.setattr(spec_module, "get_transformer_layer_offset", lambda *_: LAYERS // 2)


def classes(layers: str, config: Any = None, stock: Any = None) -> list[type]:
    spec = topk_layer_spec(
        runtime(layers), stock or get_gpt_layer_local_spec(), config or model_config()
    )
    assert isinstance(spec, TransformerBlockSubmodules)
    return [layer.module for layer in spec.layer_specs or []]  # pyright: ignore


@pytest.mark.usefixtures("one_stage")
def test_only_the_chosen_layers_are_replaced() -> None:
    dense, topk = TransformerLayer, TopKTransformerLayer
    assert classes("all,-2") == [topk, topk, topk, topk, dense, dense]
    assert classes("0,5") == [topk, dense, dense, dense, dense, topk]


@pytest.mark.usefixtures("second_stage")
def test_layers_are_numbered_over_the_whole_model() -> None:
    assert classes("all,-2") == [TopKTransformerLayer, TransformerLayer, TransformerLayer]


@pytest.mark.usefixtures("one_stage")
def test_experts_and_a_users_own_layers_keep_their_class_underneath() -> None:
    class OwnLayer(TransformerLayer):
        pass

    inner = get_gpt_layer_local_spec()
    stock = TransformerBlockSubmodules(
        layer_specs=[
            ModuleSpec(module=cls, submodules=inner.submodules, params={"kept": 1})
            for cls in [MoETransformerLayer, OwnLayer] * 3
        ]
    )
    made = classes("0,1", stock=stock)
    assert issubclass(made[0], MoETransformerLayer)
    assert issubclass(made[1], OwnLayer)
    assert made[2:] == [MoETransformerLayer, OwnLayer] * 2
    assert made[0] is with_topk(MoETransformerLayer)


@pytest.mark.parametrize("dense", [runtime("none"), None])
def test_dense_model_with_megatrons_attention_gets_the_stock_spec_itself(dense: Any) -> None:
    stock = get_gpt_layer_local_spec()
    assert topk_layer_spec(dense, stock, model_config("unfused")) is stock


def attention(spec: Any) -> Any:
    return spec.submodules.self_attention.submodules.core_attention


@pytest.mark.usefixtures("one_stage")
def test_local_layers_get_our_attention_with_and_without_a_topk() -> None:
    stock = get_gpt_layer_local_spec()
    dense: Any = topk_layer_spec(None, stock, model_config())
    assert attention(dense) is FusedAttention
    assert attention(stock) is DotProductAttention  # Megatron's spec itself is as it was
    topk: Any = topk_layer_spec(runtime("0"), stock, model_config("flash"))
    assert all(attention(layer) is FusedAttention for layer in topk.layer_specs)
    # Nothing else of Megatron's spec is replaced.
    dense.submodules.self_attention.submodules.core_attention = DotProductAttention
    assert dense == stock


@pytest.mark.usefixtures("one_stage")
@pytest.mark.parametrize("backend", ["unfused", "local"])
def test_megatrons_attention_can_be_asked_for(backend: str) -> None:
    spec: Any = topk_layer_spec(runtime("0"), get_gpt_layer_local_spec(), model_config(backend))
    assert all(attention(layer) is DotProductAttention for layer in spec.layer_specs)


@pytest.mark.usefixtures("one_stage")
def test_transformer_engine_spec_keeps_its_modules_under_the_topk() -> None:
    # Transformer Engine cannot be imported without a GPU; its spec would have this shape.
    fused = SimpleNamespace(linear_qkv="TELayerNormColumnParallelLinear")
    stock = ModuleSpec(module=TransformerLayer, submodules=fused)
    spec = topk_layer_spec(runtime("0"), stock, model_config())
    first, second = (spec.layer_specs or [])[:2]  # pyright: ignore
    assert first.module is TopKTransformerLayer
    assert first.submodules is fused
    assert second is stock
    assert "topk" not in stock.params


@pytest.mark.usefixtures("one_stage")
def test_every_norm_of_a_sequence_parallel_model_marks_its_parameters() -> None:
    config = model_config()
    config.transformer.sequence_parallel = True
    spec = topk_layer_spec(runtime("0"), get_gpt_layer_local_spec(qk_layernorm=True), config)
    assert spec.layer_norm is SequenceParallelNorm  # pyright: ignore
    layers: list[Any] = spec.layer_specs  # pyright: ignore
    for layer in layers:
        assert layer.submodules.input_layernorm is SequenceParallelNorm
        assert layer.submodules.pre_mlp_layernorm is SequenceParallelNorm
        assert layer.submodules.self_attention.submodules.q_layernorm is SequenceParallelNorm

    settings: Any = SimpleNamespace(
        normalization="RMSNorm",
        sequence_parallel=True,
        layernorm_zero_centered_gamma=False,
        memory_efficient_layer_norm=False,
    )
    norm = SequenceParallelNorm(settings, hidden_size=8)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())  # pyright: ignore
