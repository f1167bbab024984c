"""Generating text while neurons are pushed, many pushes side by side in one batch.

A push adds a number to one neuron of one layer's output, at every position of its rows, prompt
included. Rows draw the same random numbers whenever they continue the same prompt, so that what
differs between them is the push. Legend: R rows, P prompt tokens, T new tokens, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topk_megatron.analysis.hooks import changing_layers
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel


@dataclass(frozen=True)
class Push:
    """Add `amount` to `neuron` of the output of `layer`."""

    layer: int
    neuron: int
    amount: float


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: 0 takes the likeliest."""

    new_tokens: int
    temperature: float
    seed: int


def pushing(folder: OpenModel, pushes: Sequence[Push | None]) -> Any:
    """A context in which row r of every batch is pushed by pushes[r].

    A TopK LM's own `intervene` does it; other models are changed at the output of the layer.
    """
    rows: dict[Push, list[int]] = {}
    for number, push in enumerate(pushes):
        if push is not None:
            rows.setdefault(push, []).append(number)
    if not rows:
        return contextlib.nullcontext()
    if folder.topk_layers:
        from topk_megatron.hf import Intervention

        return folder.model.intervene(
            *(
                Intervention(p.layer, p.neuron, op="add", value=p.amount, rows=places)
                for p, places in rows.items()
            )
        )
    return changing_layers(
        folder.model,
        {
            layer: _adder([(p, places) for p, places in rows.items() if p.layer == layer])
            for layer in sorted({push.layer for push in rows})
        },
    )


def _adder(pushes: list[tuple[Push, list[int]]]) -> Any:
    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for push, places in pushes:
            if push.amount:  # adding 0 would turn -0 into +0
                hidden[places, :, push.neuron] += push.amount
        return hidden

    return change


@torch.inference_mode()
def generate(
    folder: OpenModel,
    prompts_RP: Tensor,
    pushes: Sequence[Push | None],
    groups: Sequence[int],
    sampling: Sampling,
) -> Tensor:
    """Continue prompts of equal length.

    Args:
        folder: the model.
        prompts_RP: int64 tokens.
        pushes: a push or None for each row.
        groups: rows of equal number draw equal random numbers.
        sampling: how to choose tokens.

    Returns:
        int64 [R, T], the new tokens.
    """
    if prompts_RP.shape[1] + sampling.new_tokens > folder.max_length:
        raise AnalysisError(
            f"{prompts_RP.shape[1]} prompt tokens and {sampling.new_tokens} new ones are more than "
            f"the {folder.max_length} positions of the model in {folder.path}"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    places = torch.tensor(list(groups))
    draws = int(places.max()) + 1
    tokens, past, found = prompts_RP.to(folder.device), None, []
    with pushing(folder, pushes):
        for _ in range(sampling.new_tokens):
            output = folder.model(tokens, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            if sampling.temperature:
                # Gumbel's trick: the argmax of logits plus this noise is a draw of the softmax.
                uniform = torch.rand((draws, logits.shape[-1]), generator=generator)
                noise = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))
                logits = logits / sampling.temperature + noise[places]
            found.append(logits.argmax(dim=-1))
            tokens = found[-1].unsqueeze(1).to(folder.device)
    return torch.stack(found, dim=1)


@torch.inference_mode()
def log_losses(folder: OpenModel, prompts_RP: Tensor, new_RT: Tensor) -> Tensor:
    """Mean loss in nats of each row's new tokens under the model as it is, [R]."""
    whole = torch.cat([prompts_RP, new_RT], dim=1).to(folder.device)
    logits = folder.model(whole, use_cache=False).logits[:, prompts_RP.shape[1] - 1 : -1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), new_RT.to(folder.device), reduction="none"
    )
    return losses.mean(dim=1).cpu()


@torch.inference_mode()
def logit_changes(
    folder: OpenModel, prompts_RP: Tensor, pushes: Sequence[Push], base_RV: Tensor | None = None
) -> Tensor:
    """How each push changes the next token's logits, mean over prompts, [pushes, V].

    The mean over the vocabulary is taken off: it changes no probability.
    """
    if base_RV is None:
        base_RV = next_logits(folder, prompts_RP, None)
    changes = []
    for push in pushes:
        change = (next_logits(folder, prompts_RP, push) - base_RV).mean(dim=0)
        changes.append(change - change.mean())
    return torch.stack(changes)


@torch.inference_mode()
def next_logits(folder: OpenModel, prompts_RP: Tensor, push: Push | None) -> Tensor:
    """Logits after the last prompt token, float32 [R, V]."""
    with pushing(folder, [push] * len(prompts_RP)):
        return (
            folder.model(prompts_RP.to(folder.device), use_cache=False).logits[:, -1].float().cpu()
        )


def repetition(new_RT: Tensor, n: int = 3) -> Tensor:
    """Share of n-grams of each row that occurred in the row before, [R]."""
    shares = []
    for row in new_RT.tolist():
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float64)
