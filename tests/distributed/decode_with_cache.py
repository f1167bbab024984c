"""Runs a model over whole sequences and again token by token with Megatron's key-value cache.

An entry for `tests.harness.launch.pretrain`; TOPK_LOGITS names the file for both logits.
"""

import os
from pathlib import Path

import torch

from topk_megatron.compat import prepare_device

BATCH, PROMPT, LENGTH = 2, 9, 16


def main() -> None:
    """Compute the logits of random tokens both ways."""
    device = prepare_device()
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model
    from topk_megatron.train.main import parse

    skip_dataset_compiler()
    args, config = parse(device)
    initialize_megatron()
    model = build_model(args, TopKRuntime(config, probing=False)).eval()
    tokens = torch.randint(0, 500, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    cache = StaticInferenceContext(BATCH, LENGTH)
    parts = [slice(0, PROMPT), *(slice(n, n + 1) for n in range(PROMPT, LENGTH))]
    cached = []
    with torch.no_grad():
        whole = model(tokens, positions, None)
        for part in parts:
            inputs = (tokens[:, part], positions[:, part], None)
            cached.append(model(*inputs, inference_context=cache, runtime_gather_output=True))
            cache.increment_sequence_len_offset(part.stop - part.start)
    torch.save((whole, cached), Path(os.environ["TOPK_LOGITS"]))


if __name__ == "__main__":
    main()
