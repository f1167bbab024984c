"""Text from a Megatron checkpoint of any layout, in one process."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.errors import CheckpointError
from topk_megatron.train.resume import find_checkpoint


class Sampler:
    """A trained model and its tokenizer, loaded once.

    The model runs without a key-value cache: right for looking at samples of a small model; for
    anything larger convert the checkpoint and use an inference library.
    """

    def __init__(self, checkpoint: Path, device: str, iteration: int | None = None) -> None:
        """Load a torch_dist checkpoint with the settings that it carries.

        Raises:
            CheckpointError: there is no complete checkpoint in `checkpoint`.
        """
        if find_checkpoint(checkpoint, iteration) is None:
            raise CheckpointError(f"{checkpoint} holds no complete checkpoint")
        self.args, self.model, self.runtime = _load(checkpoint, device, iteration)
        from megatron.training import get_tokenizer

        self.tokenizer: Any = get_tokenizer()

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_tokens: int, *, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Continue `prompt` by up to `num_tokens` tokens, ending early at the end of a document.

        Args:
            prompt: any text; its last ``seq_length`` tokens are read.
            num_tokens: tokens to draw.
            temperature: 0 takes the likeliest token.
            seed: of the draws; equal seeds give equal text.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = list(self.tokenizer.tokenize(prompt)) or [self.tokenizer.eod]
        start = len(ids)
        for _ in range(num_tokens):
            logits = self._next_logits(ids[-self.args.seq_length :])
            token = _draw(logits[: self.tokenizer.vocab_size], temperature, generator)
            if token == self.tokenizer.eod:
                break
            ids.append(token)
        return self.tokenizer.detokenize(ids[start:])

    def _next_logits(self, ids: list[int]) -> Tensor:
        device = torch.cuda.current_device()
        tokens = torch.tensor([ids], device=device)
        length = tokens.shape[1]
        positions = torch.arange(length, device=device).unsqueeze(0)
        # True where attention is not allowed, as Megatron's masks have it.
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
        return self.model(tokens, positions, mask)[0, -1].float().cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _load(checkpoint: Path, device: str, iteration: int | None) -> tuple[Any, Any, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.device.megatron_patches import patch_dataset_compiler
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import bind_topk
    from topk_megatron.train.main import be_one_process, parse

    be_one_process()
    step = [] if iteration is None else ["--ckpt-step", str(iteration)]
    sys.argv = [
        sys.argv[0],
        *("--load", str(checkpoint), *step, "--use-checkpoint-args", "--mock-data"),
        *("--no-load-optim", "--no-load-rng"),
        *("--micro-batch-size", "1", "--attention-backend", "unfused"),
    ]
    patch_dataset_compiler()
    args, config = parse(device)
    initialize_megatron()
    runtime = TopKRuntime(config, probing=False)
    builder = bind_topk(gpt_config_from_args(args), runtime)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = builder.get_builder_cls()(builder).build_model(groups).eval()
    load_checkpoint([model], None, None)
    runtime.begin_iteration(max(0, args.iteration - 1))
    return args, model, runtime
