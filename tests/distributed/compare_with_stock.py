"""Trains Megatron's stock GPT model and the TopK model side by side, and reports equality.

An entry for `tests.harness.launch.pretrain`. Megatron's builder builds the stock model from
Megatron's spec; --attention-backend chooses the core attention of both models. They get the same
weights, batches and SGD steps.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from topk_megatron.compat import prepare_device

STEPS = 20


def batches(args: Any) -> list[tuple[torch.Tensor, ...]]:
    """Make batches of random token ids: tokens, positions, mask and labels."""
    generator = torch.Generator().manual_seed(1)
    length = args.seq_length
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand(4, -1)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(0, args.tokenizer_vocab_size, (4, length + 1), generator=generator)
        made.append((ids[:, :-1].contiguous(), positions, mask, ids[:, 1:].contiguous()))
    return made


def step(model: Any, batch: tuple[torch.Tensor, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """Take one step of gradient descent, and return its loss and gradients."""
    model.zero_grad(set_to_none=True)
    tokens, positions, mask, labels = batch
    loss = model(tokens, positions, mask, labels=labels).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return float(loss), gradients


def compare(stock: Any, topk: Any, batch: tuple[torch.Tensor, ...]) -> dict[str, bool]:
    """Take one step with both models, and report whether losses and gradients are equal."""
    loss, gradients = step(stock, batch)
    other_loss, other = step(topk, batch)
    assert gradients.keys() == other.keys()
    equal = all(torch.equal(gradients[name], other[name]) for name in gradients)
    return {"loss_equal": loss == other_loss, "gradients_equal": equal}


def main() -> None:
    """Compare for 20 steps, then once more with one neuron fewer."""
    device = prepare_device()
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model
    from topk_megatron.train.main import parse

    skip_dataset_compiler()
    args, config = parse(device)
    initialize_megatron()
    stock, topk = build_model(args, None), build_model(args, TopKRuntime(config, probing=False))
    topk.load_state_dict(stock.state_dict())
    steps = [compare(stock, topk, batch) for batch in batches(args)]
    fewer = build_model(args, TopKRuntime(replace(config, k=config.hidden_size - 1), probing=False))
    fewer.load_state_dict(stock.state_dict())
    report = {
        "stock_layers": sorted({type(layer).__name__ for layer in stock.decoder.layers}),
        "topk_layers": sorted({type(layer).__name__ for layer in topk.decoder.layers}),
        "attention": sorted(
            {
                type(layer.self_attention.core_attention).__name__
                for model in (stock, topk)
                for layer in model.decoder.layers
            }
        ),
        "steps": steps,
        "one_neuron_fewer": compare(stock, fewer, batches(args)[0]),
    }
    Path(os.environ["TOPK_REPORT"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
