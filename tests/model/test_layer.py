"""The TopK after a layer's residual add, on stand-ins for Megatron's layer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityFuncOp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topk_megatron.config import TopKConfig
from topk_megatron.model.layer import TopKAfterAdd
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.ops import topk_mask

H, K = 12, 3


def runtime() -> TopKRuntime:
    made = TopKRuntime(TopKConfig(hidden_size=H, num_layers=1, k=K, layers=(0,)))
    made.register(0)
    return made


def layer_with(topk: TopKRuntime, build: Any = get_bias_dropout_add) -> Any:
    layer = SimpleNamespace(mlp_bda=build, bias_dropout_add_exec_handler=torch.enable_grad)
    TopKAfterAdd(topk, 0).attach(layer)
    return layer


def add(layer: Any, x: Tensor, residual: Tensor, *, training: bool = True) -> Tensor:
    """Run the end of a layer as transformer_layer.py and fine_grained_callables.py do."""
    with layer.bias_dropout_add_exec_handler():
        return layer.mlp_bda(training, False)((x, None), residual, 0.0)


def test_the_topk_follows_the_residual_add() -> None:
    topk = runtime()
    x, residual = torch.randn(5, H), torch.randn(5, H)
    assert torch.equal(add(layer_with(topk), x, residual), topk_mask(x + residual, K))
    assert topk.left_out(training=True) == []
    assert topk.left_out(training=False) == [("residual stream", 0)]


def test_a_layer_without_an_mlp_has_its_topk_too() -> None:
    """Its add is a module, which returns what the MLP would have added to."""
    topk = runtime()
    layer, x = layer_with(topk, IdentityFuncOp()), torch.randn(5, H)
    assert torch.equal(layer.mlp_bda(True, False)(x, x, 0.0), topk_mask(x, K))
    assert topk.left_out(training=True) == []


@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_the_topk_runs_in_the_mode_of_the_layers_caller(keeps_gradients: bool) -> None:
    """Megatron enables gradients around the add, even in the first pass of recomputation."""
    layer, residual = layer_with(runtime()), torch.randn(5, H, requires_grad=True)
    with torch.set_grad_enabled(keeps_gradients):
        output = add(layer, torch.randn(5, H), residual)
        assert torch.is_grad_enabled() == keeps_gradients
    assert output.requires_grad == keeps_gradients


def test_a_recomputed_layer_is_observed_once_and_has_the_same_gradient() -> None:
    gradients = []
    x = torch.randn(5, H)
    for recompute in (True, False):
        topk = runtime()
        layer, residual = layer_with(topk), torch.linspace(0, 1, 5 * H).view(5, H)
        residual.requires_grad_()
        output: Any = (
            checkpoint(add, layer, x, residual, use_reentrant=True)
            if recompute
            else add(layer, x, residual)
        )
        output.square().sum().backward()
        gradients.append(residual.grad)
        assert topk.applications[True]["residual stream", 0] == 1 + recompute
        assert topk.probes[0].num_rows == 5
        counts = topk.probes[0].counts
        assert counts is not None
        assert counts.sum() == 5 * K
    assert torch.equal(*gradients)
