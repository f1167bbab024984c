"""The parts of a decoder layer: norm, attention, MLP, mixture of experts, and the TopK at its end.

They compute what Megatron-Core's layers compute, in the same order of operations, for every
configuration that `configuration_topk` accepts. Shapes: b rows, s positions, h hidden size,
f intermediate size, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward

from .activation_topk import TopKActivation
from .configuration_topk import TopKLMConfig


def make_norm(config: TopKLMConfig, size: int) -> nn.Module:
    """Return torch's RMSNorm or LayerNorm over the last dimension."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


class TopKLMRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's cosines and sines over the rotated part of head_dim, with its scalings."""

    @staticmethod
    def compute_default_rope_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        config: TopKLMConfig, device: Any = None, seq_len: int | None = None, **_: Any
    ) -> tuple[Tensor, float]:
        """Return inverse frequencies of plain RoPE; transformers 5 asks the model for them."""
        size = int(config.head_dim * config.partial_rotary_factor)
        exponents = torch.arange(0, size, 2, dtype=torch.int64).to(dtype=torch.float, device=device)
        return 1.0 / (config.rope_theta ** (exponents / size)), 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first dimensions of x [b, heads, s, d] by cos, sin [b, s, r]; r <= d."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        # cos and sin hold each angle twice, as two halves; pairs need neighbours.
        cos, sin = (t[..., : size // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
    turned = turned * cos + half * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class TopKLMAttention(nn.Module):
    """Causal self-attention with grouped queries and, if set, norms of queries and keys."""

    def __init__(self, config: TopKLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        h = config.hidden_size
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(h, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(h, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(h, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, h, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return [b, s, h], and the attention weights where the implementation has them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        interleaved = self.config.rotary_interleaved
        query = rotate(query.transpose(1, 2), *position_embeddings, interleaved=interleaved)
        key = rotate(key.transpose(1, 2), *position_embeddings, interleaved=interleaved)
        if past_key_values is not None:
            # transformers 4 needs the place in a static cache; 5 keeps it in the cache.
            where = () if cache_position is None else ({"cache_position": cache_position},)
            key, value = past_key_values.update(key, value, self.layer_idx, *where)
        attend: Callable[..., Any] = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class TopKMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``; with a TopK on what down reads."""

    def __init__(self, config: TopKLMConfig, size: int, topk: TopKActivation | None = None) -> None:
        super().__init__()
        h, bias = config.hidden_size, config.mlp_bias
        if config.gated_mlp:
            self.gate_proj = nn.Linear(h, size, bias=bias)
        self.up_proj = nn.Linear(h, size, bias=bias)
        self.down_proj = nn.Linear(size, h, bias=bias)
        self.gated = config.gated_mlp
        self.act_fn = ACT2FN[config.hidden_act]
        if topk is not None:
            self.topk = topk

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return [..., h]; `scale` [..., 1] weighs an expert's output, its bias included."""
        if self.gated:
            hidden = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        else:
            hidden = self.act_fn(self.up_proj(hidden_states))
        if hasattr(self, "topk"):
            hidden = self.topk(hidden)
        if scale is None:
            return self.down_proj(hidden)
        # Megatron weighs before the projection (megatron/core/transformer/moe/experts.py).
        output = nn.functional.linear(hidden * scale, self.down_proj.weight)
        return output if self.down_proj.bias is None else output + self.down_proj.bias * scale


class TopKLMRouter(nn.Module):
    """Chooses experts for each token, as Megatron's `topk_routing_with_score_function` does."""

    def __init__(self, config: TopKLMConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias: Tensor | None
        bias = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [n, experts per token] and expert numbers, int64 of the same shape."""
        logits = nn.functional.linear(hidden_states, self.weight)
        count = self.config.num_experts_per_tok
        if self.config.router_score_function == "sigmoid":
            scores = torch.sigmoid(logits.float())
            bias = self.expert_bias
            biased = scores if bias is None else scores + bias.float()
            experts = torch.topk(biased, count, dim=1).indices
            weights = scores.gather(1, experts)
            if count > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.config.router_pre_softmax:
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
            weights, experts = torch.topk(scores, count, dim=1)
        else:
            chosen, experts = torch.topk(logits, count, dim=1)
            weights = torch.softmax(chosen, dim=-1, dtype=torch.float32)
        if self.config.router_scaling_factor:
            weights = weights * self.config.router_scaling_factor
        return weights.type_as(logits), experts


class TopKMoE(nn.Module):
    """A mixture of experts without dropped tokens, and perhaps an expert for every token."""

    def __init__(self, config: TopKLMConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.moe_intermediate_size or config.intermediate_size
        self.gate = TopKLMRouter(config)
        self.experts = nn.ModuleList(
            TopKMLP(config, size, mlp_topk(config, layer_idx, expert=True))
            for _ in range(config.num_experts)
        )
        if config.shared_expert_intermediate_size:
            activation = mlp_topk(config, layer_idx, expert=True)
            self.shared_expert = TopKMLP(config, config.shared_expert_intermediate_size, activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [b, s, h]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(rows)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            if row.numel():
                part = expert(rows[row], weights[row, place].unsqueeze(-1))
                output.index_add_(0, row, part.to(output.dtype))
        output = output.view_as(hidden_states)
        if hasattr(self, "shared_expert"):
            output = output + self.shared_expert(hidden_states)
        return output


def mlp_topk(config: TopKLMConfig, layer_idx: int, *, expert: bool) -> TopKActivation | None:
    """Return the TopK inside a layer's MLP; None if it has none."""
    topk = config.topk
    if topk["site"] == "residual" or layer_idx not in topk["layers"]:
        return None
    number = None if expert else layer_idx
    return TopKActivation(number, topk["mlp_k"], topk["mode"], topk["mlp_groups"])


class TopKDecoderLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, ``x + mlp(norm(x))``, and the TopK if this layer has one."""

    def __init__(self, config: TopKLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = TopKLMAttention(config, layer_idx)
        if layer_idx in config.moe_layers:
            self.mlp: nn.Module = TopKMoE(config, layer_idx)
        else:
            activation = mlp_topk(config, layer_idx, expert=False)
            self.mlp = TopKMLP(config, config.intermediate_size, activation)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        if config.topk["site"] != "mlp" and layer_idx in config.topk["layers"]:
            self.topk = TopKActivation(layer_idx, config.topk["k"], config.topk["mode"])

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return [b, s, h], sparse at a TopK layer."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return self.topk(hidden_states) if hasattr(self, "topk") else hidden_states
