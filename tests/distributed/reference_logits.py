"""Builds and saves a model with Megatron, and computes Megatron's logits, in one process.

An entry with Megatron's flags. Without ``--load`` the weights are Megatron's initial ones plus a
little noise, so that no norm, bias or expert has its initial value. TOPK_LOGITS names the file for
tokens and logits.
"""

import os
from pathlib import Path

import torch

from tests.harness.launch import REPOSITORY
from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device

ROWS, LENGTH = 4, 64


@exit_on_user_error
def main() -> None:
    """Build or load the model, and compute the logits."""
    device = prepare_device()
    from megatron.training import get_tokenizer
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model
    from topk_megatron.train.main import be_one_process, parse

    be_one_process()
    skip_dataset_compiler()
    args, config = parse(device)
    initialize_megatron()
    runtime = TopKRuntime(config, probing=False)
    model = build_model(args, runtime).eval()
    if args.load is None:
        generator = torch.Generator().manual_seed(7)
        tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        for tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data.add_(0.1 * noise.to(tensor.dtype))
        args.iteration = 4
        args.consumed_train_samples = 32
        args.no_save_optim = args.no_save_rng = True
        save_checkpoint(args.iteration, [model], None, None, 0)
    else:
        load_checkpoint([model], None, None)
    runtime.begin_step(max(0, args.iteration - 1))

    tokenizer = get_tokenizer()
    assert tokenizer is not None
    ids = tokenizer.tokenize((REPOSITORY / "LICENSE").read_text())[: ROWS * LENGTH]
    tokens = torch.tensor(ids).view(ROWS, LENGTH)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, positions, mask).float()
    torch.save((tokens, logits[..., : tokenizer.vocab_size]), Path(os.environ["TOPK_LOGITS"]))


if __name__ == "__main__":
    main()
