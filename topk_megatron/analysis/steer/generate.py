"""Generates text while neurons are pushed, many pushes together in one batch.

A push adds a number to one neuron of one layer's output, at every position of its rows, prompt
included. Rows that continue the same prompt draw the same random numbers, so that they differ by
the push alone. Legend: R rows, P prompt tokens, T new tokens, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topk_megatron.analysis.sources import changing_layers
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel


@dataclass(frozen=True)
class Push:
    """An addition to one neuron of a layer's output.

    Attributes:
        layer: the layer.
        neuron: the neuron.
        amount: the number that is added.
    """

    layer: int
    neuron: int
    amount: float


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        new_tokens: tokens to write.
        temperature: 0 takes the likeliest token.
        seed: the seed of the draws.
    """

    new_tokens: int
    temperature: float
    seed: int


def pushing(folder: OpenModel, pushes: Sequence[Push | None]) -> Any:
    """Return a context in which row r of every batch is pushed by pushes[r].

    A TopK LM is pushed by its own `intervene`, other models at the output of the layer.
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
            if push.amount:  # Adding 0 would turn -0 into +0.
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
        groups: the group of each row; rows of one group draw the same random numbers.
        sampling: how to choose tokens.

    Returns:
        The new tokens, int64 [R, T].

    Raises:
        AnalysisError: prompts and new tokens are longer than the model allows.
    """
    if prompts_RP.shape[1] + sampling.new_tokens > folder.max_length:
        raise AnalysisError(
            f"{prompts_RP.shape[1]} prompt tokens and {sampling.new_tokens} new ones are more than "
            f"the {folder.max_length} positions of the model in {folder.path}; give fewer"
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
                # Gumbel's trick: the argmax of logits plus this noise is a draw from the softmax.
                uniform = torch.rand((draws, logits.shape[-1]), generator=generator)
                noise = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))
                logits = logits / sampling.temperature + noise[places]
            found.append(logits.argmax(dim=-1))
            tokens = found[-1].unsqueeze(1).to(folder.device)
    return torch.stack(found, dim=1)


@torch.inference_mode()
def log_losses(folder: OpenModel, prompts_RP: Tensor, new_RT: Tensor) -> Tensor:
    """Return the mean loss in nats of each row's new tokens under the unpushed model, [R]."""
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
    """Return how each push changes the next token's logits, mean over prompts, [pushes, V].

    The mean over the vocabulary, which changes no probability, is subtracted. `base_RV` are the
    logits without a push, if they are known.
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
    """Return the logits after the last prompt token, float32 [R, V]."""
    with pushing(folder, [push] * len(prompts_RP)):
        return (
            folder.model(prompts_RP.to(folder.device), use_cache=False).logits[:, -1].float().cpu()
        )


def repetition(new_RT: Tensor, n: int = 3) -> Tensor:
    """Return the share of n-grams of each row that occurred earlier in the row, float64 [R]."""
    shares = []
    for row in new_RT.tolist():
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float64)
