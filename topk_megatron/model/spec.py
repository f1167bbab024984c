"""Puts TopK layers into the spec that Megatron chose: local or Transformer Engine, dense or MoE.

`GPTModelConfig.transformer_layer_spec` accepts a callable. Ours asks Megatron for its default spec
and replaces the class of the chosen layers and, in local layers, that of the core attention
(`topk_megatron.model.attention`); everything else stays stock.
"""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, LayerType
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from topk_megatron.errors import ConfigError
from topk_megatron.model.attention import FusedAttention, why_megatrons_own
from topk_megatron.model.layer import with_topk
from topk_megatron.model.runtime import TopKRuntime

LayerSpec = ModuleSpec | TransformerBlockSubmodules


def bind_topk(config: GPTModelConfig, runtime: TopKRuntime | None) -> GPTModelConfig:
    """Make `config` build TopK layers on top of its own spec (``--spec``), and return it.

    Without a `runtime` no layer has a TopK, and the core attention is the same as with one.
    """
    config.transformer_layer_spec = functools.partial(  # pyright: ignore[reportAttributeAccessIssue]
        topk_layer_spec, runtime, config.transformer_layer_spec
    )
    return config


def build_model(args: Any, runtime: TopKRuntime | None) -> Any:
    """Build one model chunk from Megatron's arguments, without a TopK if `runtime` is None.

    This serves callers that need a model without a training run. Process groups must be
    initialised.
    """
    config: Any = bind_topk(gpt_config_from_args(args), runtime)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_model(groups)


def topk_layer_spec(
    runtime: TopKRuntime | None, stock: Any, config: GPTModelConfig, vp_stage: int | None = None
) -> LayerSpec:
    """Return the spec of the layers in one model chunk of this rank.

    If the model has no TopK layer and keeps Megatron's attention, this is Megatron's own spec,
    except that norms which could not run sequence parallel are replaced.
    """
    spec = _stock_spec(stock, config, vp_stage)
    transformer = config.transformer
    if why_megatrons_own(transformer) is None:
        spec = _with_replaced(spec, DotProductAttention, FusedAttention)
    needs_norms = transformer.sequence_parallel and LayerNormImpl is WrappedTorchNorm
    if needs_norms:
        spec = _as_block(spec, transformer, vp_stage)
        spec = _with_replaced(spec, WrappedTorchNorm, SequenceParallelNorm)
    if runtime is None or not runtime.config.layers:
        return spec
    block = _as_block(spec, transformer, vp_stage)
    return _with_topk_layers(block, runtime, transformer, vp_stage)


def _stock_spec(stock: Any, config: GPTModelConfig, vp_stage: int | None) -> LayerSpec:
    if stock is None:
        return default_layer_spec(config, vp_stage)  # pyright: ignore[reportArgumentType]
    if isinstance(stock, ModuleSpec | TransformerBlockSubmodules):
        return stock
    takes_stage = "vp_stage" in inspect.signature(stock).parameters
    return stock(config, vp_stage=vp_stage) if takes_stage else stock(config)


def _as_block(
    spec: LayerSpec, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Expand a single spec into one per layer, as Megatron's block does."""
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    if config.attention_backend == AttnBackend.local:
        # Megatron's builder applies this flag to single specs only.
        attention: Any = spec.submodules.self_attention  # pyright: ignore
        attention.submodules.core_attention = DotProductAttention
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * count,
        layer_norm=LayerNormImpl,  # pyright: ignore[reportArgumentType]
    )


def _with_topk_layers(
    block: TransformerBlockSubmodules,
    runtime: TopKRuntime,
    config: TransformerConfig,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    specs = block.layer_specs or []
    numbers = _layer_numbers(config, vp_stage, len(specs))
    chosen = set(runtime.config.layers)
    return replace(
        block,
        layer_specs=[
            _topk_spec(spec, runtime) if number in chosen else spec
            for number, spec in zip(numbers, specs, strict=True)
        ],
    )


def _topk_spec(spec: ModuleSpec, runtime: TopKRuntime) -> ModuleSpec:
    layer_class: Any = import_module(spec.module) if isinstance(spec.module, tuple) else spec.module
    return replace(spec, module=with_topk(layer_class), params={**spec.params, "topk": runtime})


def _layer_numbers(config: TransformerConfig, vp_stage: int | None, count: int) -> list[int]:
    """Return the numbers, from 0 over the whole model, of the layers in this rank's chunk."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(  # pyright: ignore
            layer_type=LayerType.decoder, vp_stage=vp_stage
        )
    offset = get_transformer_layer_offset(config, vp_stage)
    return list(range(offset, offset + count))


def _with_replaced(spec: Any, old: type, new: type) -> Any:
    """Return a copy of a spec tree with one class replaced by another, or the tree without it."""
    if spec is old:
        return new
    if isinstance(spec, list):
        items = [_with_replaced(item, old, new) for item in spec]
        return spec if _same(items, spec) else items
    if isinstance(spec, functools.partial):
        keywords = {key: _with_replaced(value, old, new) for key, value in spec.keywords.items()}
        if _same(keywords.values(), spec.keywords.values()):
            return spec
        return functools.partial(spec.func, *spec.args, **keywords)
    if is_dataclass(spec) and not isinstance(spec, type):
        before = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        after = {name: _with_replaced(value, old, new) for name, value in before.items()}
        return spec if _same(after.values(), before.values()) else replace(spec, **after)
    return spec


def _same(ones: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(ones, others, strict=True))


_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class SequenceParallelNorm:
    """Builds a `torch.nn.LayerNorm` or `RMSNorm` whose parameters are marked sequence parallel.

    Megatron's own wrapper refuses sequence parallelism (megatron/core/transformer/torch_norm.py):
    the norm's weight sees only this rank's share of the sequence, so its gradient must be summed
    over tensor-parallel ranks. Megatron sums the gradients of parameters marked
    ``sequence_parallel`` (see `finalize_model_grads`), and this norm marks its own.

    Raises:
        ConfigError: if torch's norms lack the normalisation or an option.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        if config.normalization not in _NORMS:
            raise ConfigError(
                f"--normalization {config.normalization} with --sequence-parallel needs "
                f"Transformer Engine; without it, use one of {', '.join(_NORMS)}"
            )
        for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, option):
                raise ConfigError(f"{option} needs Transformer Engine; drop the flag")
        norm = _NORMS[config.normalization](normalized_shape=hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore
        return norm
