"""Attention through torch's fused kernels, for layers that do not come from Transformer Engine.

    Y = dropout(softmax(scale Q K^T + mask)) V

Megatron's own class, `DotProductAttention`, writes the scores of all pairs of tokens, [B, N, S, T],
and keeps them for the backward pass. `torch.nn.functional.scaled_dot_product_attention` computes
the same from tiles: it keeps one number per row of scores, and memory grows with S, not with S T.
docs/design/0012-attention.md says when torch still writes all scores.

Shapes: S queries, T keys, B sequences, N heads and G <= N key-value heads of this rank, D per head.
"""

import contextlib
import itertools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.utils import get_sliding_window_causal_mask
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_OWN = (AttnBackend.unfused, AttnBackend.local)
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def why_megatrons_own(config: Any) -> str | None:
    """Return the flag that calls for Megatron's own attention; None means that ours can serve.

    Args:
        config: Megatron's arguments or its `TransformerConfig`, which share these names.
    """
    reasons = {
        f"--attention-backend {config.attention_backend.name}": config.attention_backend in _OWN,
        # Its softmax has one more entry in the denominator, which torch's function has not.
        f"--softmax-type {config.softmax_type}": config.softmax_type != "vanilla",
        # Its keys are wider than its values, for which torch has no fused kernel on a CPU.
        "--multi-latent-attention": config.multi_latent_attention,
        "--experimental-attention-variant": config.experimental_attention_variant is not None,
        # It replaces the operators that Megatron's own attention is made of.
        "--batch-invariant-mode": config.batch_invariant_mode,
    }
    return next((flag for flag, asked in reasons.items() if asked), None)


class FusedAttention(DotProductAttention):
    """Core attention with the interface, settings and parameters of the class it replaces.

    It differs in rounding, and in three cases that Megatron's class leaves out: packed sequences;
    a window and a mask at once, which both hold here (there, the window alone); and
    ``padding_causal`` without a mask, which is causal here (there, every query sees every key).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.config.softmax_type == "vanilla", self.config.softmax_type
        # Under --apply-query-key-layer-scaling Megatron divides the scores by the layer's number
        # and multiplies them by it in the softmax, to keep them in half precision's range. The
        # kernels compute scores in float32 and need only the product.
        self.scale: float = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        self.window: tuple[int, int] | None = self.scale_mask_softmax.window_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the attention's output.

        Args:
            query: [S, B, N, D], or [S, N, D] if sequences are packed.
            key: [T, B, G, D] or [T, G, D].
            value: [T, B, G, D] or [T, G, D].
            attention_mask: bool, True where a query must not see a key; broadcastable to
                [B, N, S, T]. None leaves the mask to the layer's type.
            attn_mask_type: ignored, as Megatron's class does; the layer's own type counts.
            attention_bias: not supported, as in Megatron's class.
            packed_seq_params: boundaries of packed sequences (``thd``).

        Returns:
            [S, B, N D], contiguous, or [S, N D] if sequences are packed.
        """
        assert attention_bias is None, "attention bias needs Transformer Engine's attention"
        if packed_seq_params is not None:
            assert attention_mask is None, "packed sequences have boundaries and no mask"
            return self._attend_packed(query, key, value, packed_seq_params)
        q_BNSD, k_BGTD, v_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        y_BNSD = self._attend(q_BNSD, k_BGTD, v_BGTD, attention_mask)
        return y_BNSD.permute(2, 0, 1, 3).contiguous().flatten(2)

    def _attend(self, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, masked: Any) -> Tensor:
        num_queries, num_keys = q_BNSD.shape[2], k_BGTD.shape[2]
        if self.window is not None:
            window_ST = get_sliding_window_causal_mask(num_queries, num_keys, self.window)
            masked = window_ST if masked is None else masked | window_ST
        # A single query is the last one, which sees all keys: it decodes from a key-value cache.
        is_causal = masked is None and self.attn_mask_type in _CAUSAL and num_queries > 1
        assert not is_causal or num_queries == num_keys, "a causal mask needs as many keys"
        allowed = None
        if masked is not None:
            # Megatron's softmax gives a query without keys the mean of all values, and no gradient
            # to its query. So does equal attention to all keys, which zeros as the query give.
            is_blind = masked.all(-1, keepdim=True)
            q_BNSD = q_BNSD.masked_fill(is_blind, 0)
            allowed = ~masked | is_blind
        return self._call_kernel(q_BNSD, k_BGTD, v_BGTD, allowed, is_causal)

    def _call_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, is_causal: bool
    ) -> Tensor:
        dropout = self.attention_dropout.p if self.training else 0.0
        shares = key.shape[1] < query.shape[1]
        if shares and not _shares_heads(query, key, value, allowed, dropout, is_causal):
            count = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(count, dim=1) for x in (key, value))
        # As in Megatron's class: tensor-parallel ranks draw differently for their different heads.
        forks = dropout > 0 and not self.config.sequence_parallel
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        with tracker.fork() if forks else contextlib.nullcontext():
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.scale,
                enable_gqa=key.shape[1] < query.shape[1],
            )

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Attend within each sequence; rows outside all sequences are zeros."""
        assert packed.qkv_format == "thd", packed.qkv_format
        queries = _ranges(packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
        keys = _ranges(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)
        pieces: list[Tensor] = []
        position = 0
        for (start, end), (first, last) in zip(queries, keys, strict=True):
            if start == end:
                continue
            pieces.append(torch.zeros_like(query[position:start]))
            q_BNSD, k_BGTD, v_BGTD = (
                x.transpose(0, 1).unsqueeze(0)
                for x in (query[start:end], key[first:last], value[first:last])
            )
            pieces.append(self._attend(q_BNSD, k_BGTD, v_BGTD, None)[0].transpose(0, 1))
            position = end
        pieces.append(torch.zeros_like(query[position:]))
        return torch.cat(pieces).flatten(1)


def _ranges(lengths: Any, padded: Any) -> list[tuple[int, int]]:
    """Return where each packed sequence starts and ends.

    Args:
        lengths: int [sequences + 1], cumulative lengths.
        padded: the same with each sequence's padding, where there is any; None if there is none.
    """
    sums = lengths.tolist()
    starts = sums if padded is None else padded.tolist()
    sizes = [after - before for before, after in itertools.pairwise(sums)]
    return [(start, start + size) for start, size in zip(starts[:-1], sizes, strict=True)]


def _shares_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    dropout: float,
    is_causal: bool,
) -> bool:
    """Return whether torch takes fewer key-value heads without writing all scores for it.

    On a GPU only its flash kernel does. Its other kernels need copies of the heads, which are
    small beside the scores.
    """
    if query.device.type != "cuda":
        return True
    parameters: Any = torch.backends.cuda.SDPAParams(
        query, key, value, allowed, dropout, is_causal, True
    )
    return torch.backends.cuda.can_use_flash_attention(parameters)
