"""Grouped experts with a TopK compute what experts one after the other do.

Transformer Engine's grouped projections need a GPU. Here a loop over the experts stands in for
them; the rest of Megatron's `TEGroupedMLP` and `SequentialMLP` is real.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import (
    GroupedMLPSubmodules,
    SequentialMLP,
    TEGroupedMLP,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.model.mlp import add_topk

EXPERTS, HIDDEN, WIDTH = 3, 16, 24
TOKENS = [5, 0, 9]  # an expert without a token among them


class OneLinear(nn.Module):
    """A projection of one expert, with Megatron's signature."""

    def __init__(self, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


class GroupedLinear(nn.Module):
    """The projections of all experts, tokens in expert order, with Transformer Engine's names."""

    def __init__(self, experts: int, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        for expert in range(experts):
            weight = nn.Parameter(torch.empty(output_size, input_size))
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        parts = torch.split(x, tokens_per_expert)
        weights = [getattr(self, f"weight{expert}") for expert in range(len(parts))]
        return torch.cat([part @ w.T for part, w in zip(parts, weights, strict=True)]), None


def config(**changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 1,
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": WIDTH,
        "ffn_hidden_size": WIDTH,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }
    return TransformerConfig(**{**settings, **changes})


def both(**changes: Any) -> tuple[TEGroupedMLP, SequentialMLP]:
    """Return grouped and sequential experts with the same weights, without a TopK."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(ep=group, expt_tp=group, expt_dp=group)
    linear: Any = GroupedLinear
    grouped = TEGroupedMLP(
        EXPERTS, config(**changes), GroupedMLPSubmodules(linear, linear), pg_collection=groups
    )
    one: Any = OneLinear
    sequential = SequentialMLP(
        EXPERTS, config(**changes), MLPSubmodules(one, one), pg_collection=groups
    )
    generator = torch.Generator().manual_seed(0)
    for number, expert in enumerate(sequential.local_experts):
        expert.tp_group = groups.expt_tp  # Megatron asks torch.distributed, which does not run here
        for name in ("linear_fc1", "linear_fc2"):
            weight: Any = getattr(expert, name).weight
            # Few distinct numbers, so that activations tie.
            weight.data.copy_((torch.randn(weight.shape, generator=generator) * 2).round() / 4)
            getattr(getattr(grouped, name), f"weight{number}").data.copy_(weight.data)
    return grouped, sequential


def topk(groups: int | None = None, k: int = 6) -> TopKConfig:
    return TopKConfig(
        hidden_size=HIDDEN,
        num_layers=1,
        k=4,
        layers=(0,),
        site="mlp",
        mlp_k=k,
        mlp_groups=groups,
    )


def run(experts: Any) -> dict[str, Tensor]:
    """Return output and gradients of one forward and backward pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(TOKENS), HIDDEN, generator=generator).requires_grad_()
    weights = torch.rand(sum(TOKENS), generator=generator).requires_grad_()
    output, bias = experts(x, torch.tensor(TOKENS), weights)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=generator))
    assert x.grad is not None
    assert weights.grad is not None
    return {"output": output.detach(), "input": x.grad, "routing": weights.grad}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("groups", [None, 3])
def test_grouped_experts_equal_sequential_ones(groups: int | None, gated: bool) -> None:
    grouped, sequential = both(gated_linear_unit=gated)
    dense = run(grouped)
    grouped.zero_grad()
    for experts in (grouped, sequential):
        add_topk(experts, topk(groups))
    got, wanted = run(grouped), run(sequential)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
    assert not torch.equal(got["output"], dense["output"])
    for number, expert in enumerate(sequential.local_experts):
        for name in ("linear_fc1", "linear_fc2"):
            weight: Any = getattr(expert, name).weight
            assert torch.equal(
                getattr(getattr(grouped, name), f"weight{number}").grad, weight.grad
            ), (number, name)


def test_exactly_k_units_of_each_token_reach_the_second_projection() -> None:
    grouped, _ = both()
    add_topk(grouped, topk())
    seen: list[Tensor] = []
    topk_module: Any = grouped.topk
    topk_module.register_forward_hook(lambda _, __, output: seen.append(output))
    run(grouped)
    (selected,) = seen
    assert selected.shape == (sum(TOKENS), WIDTH)
    assert int((selected != 0).sum(-1).max()) <= 6


def test_each_application_is_reported_with_the_mode_of_the_experts() -> None:
    """A run stops if a TopK of its layers reports nothing (topk_megatron/train/bypass.py)."""
    for experts in both():
        modes: list[bool] = []
        add_topk(experts, topk(), modes.append)
        run(experts)
        assert modes
        assert all(modes)
        modes.clear()
        run(experts.eval())
        assert modes
        assert not any(modes)


def test_weights_applied_to_the_input_are_left_to_megatron() -> None:
    changes = {"moe_apply_probs_on_input": True, "moe_router_topk": 1}
    changes["moe_router_pre_softmax"] = True
    grouped, sequential = both(**changes)
    for experts in (grouped, sequential):
        add_topk(experts, topk())
    got, wanted = run(grouped), run(sequential)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attribute", "value", "complaint"),
    [
        ("fp8", "hybrid", "--fp8-format or --fp4-format"),
        ("add_bias_linear", True, "--disable-bias-linear"),
    ],
)
def test_experts_without_room_for_a_topk_name_the_flag(
    attribute: str, value: Any, complaint: str
) -> None:
    grouped, _ = both()
    setattr(grouped.config, attribute, value)
    with pytest.raises(ConfigError, match=rf"--moe-grouped-gemm cannot be .*{complaint}"):
        add_topk(grouped, topk())


def test_fused_grouped_experts_are_refused() -> None:
    grouped, _ = both()
    grouped._with_fused_impl = True
    with pytest.raises(ConfigError, match="--use-transformer-engine-op-fuser"):
        add_topk(grouped, topk())


def test_a_k_above_the_experts_width_is_refused() -> None:
    grouped, _ = both()
    with pytest.raises(ConfigError, match="at most the MLP's inner dimension, 24"):
        add_topk(grouped, topk(k=25))
