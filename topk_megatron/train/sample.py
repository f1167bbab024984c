"""Generates text from a Megatron checkpoint of any parallel layout, in one process."""

import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.checkpoint.directory import open_checkpoint
from topk_megatron.checkpoint.flags import shapes_the_model
from topk_megatron.checkpoint.pickles import StandIn
from topk_megatron.errors import CheckpointError
from topk_megatron.text.tokenizer import check_tokenizer_path
from topk_megatron.train.arguments import CPU_DEFAULTS
from topk_megatron.train.bypass import check_applied


class Sampler:
    """A trained model and its tokenizer, loaded once.

    The model runs without a key-value cache, which suits samples from a small model. For anything
    larger, convert the checkpoint and use an inference library.

    Attributes:
        args: Megatron's arguments.
        model: the model, in evaluation mode.
        runtime: the model's TopK layers.
        tokenizer: Megatron's tokenizer.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: str,
        *,
        iteration: int | None = None,
        tokenizer_model: Path | None = None,
        trust: bool = False,
    ) -> None:
        """Load a torch_dist checkpoint with the settings stored in it.

        Args:
            checkpoint: the directory that was given to ``--save``.
            device: ``cuda`` or ``cpu``.
            iteration: which checkpoint; None is the latest.
            tokenizer_model: the tokenizer, if it is no longer where the training run found it.
            trust: whether Megatron may open objects of classes that a checkpoint does not need.

        Raises:
            UnsafeCheckpointError: if opening the checkpoint could run code and `trust` is False.
            CheckpointError: if `checkpoint` holds no complete checkpoint, or its weights do not
                match its settings.
            DataError: if the tokenizer is missing.
        """
        reader = open_checkpoint(checkpoint, iteration)
        if reader is None:
            raise CheckpointError(
                f"{checkpoint} holds no complete torch_dist checkpoint; check --load"
            )
        saved, directory = reader.args, reader.directory
        flags = _flags(checkpoint, saved, iteration, tokenizer_model)
        flags += ["--topk-trust-checkpoint"] if trust else []
        self.args, self.model, self.runtime = _load(directory, saved, flags, device)
        from megatron.training import get_tokenizer

        self.tokenizer: Any = get_tokenizer()
        self._checked = False

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_tokens: int, *, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Continue `prompt` by up to `num_tokens` tokens; the end of a document ends it early.

        Args:
            prompt: any text; the model reads its last ``seq_length`` tokens.
            num_tokens: number of tokens to draw.
            temperature: temperature of the draws; 0 always takes the likeliest token.
            seed: seed of the draws; equal seeds give equal text.

        Returns:
            The continuation, without the prompt.
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
        # True where attention is not allowed, as in Megatron's masks.
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
        logits = self.model(tokens, positions, mask)
        if not self._checked:
            self._checked = True
            check_applied(self.runtime, training=False, when="the first forward pass")
        return logits[0, -1].float().cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _flags(
    checkpoint: Path, saved: Namespace, iteration: int | None, tokenizer_model: Path | None
) -> list[str]:
    """Return the command line of a run that only loads."""
    tokenizer = str(tokenizer_model or saved.tokenizer_model or "")
    if tokenizer:
        check_tokenizer_path(saved.tokenizer_type, tokenizer)
    return [
        *("--load", str(checkpoint), "--use-checkpoint-args", "--mock-data"),
        *(["--ckpt-step", str(iteration)] if iteration is not None else []),
        *(["--tokenizer-model", tokenizer] if tokenizer else []),
        *("--no-use-tokenizer-model-from-checkpoint-args", "--no-load-optim", "--no-load-rng"),
        *("--tokenizer-type", saved.tokenizer_type, "--micro-batch-size", "1"),
    ]


def _model_settings(saved: Namespace) -> dict[str, Any]:
    """Returns every saved argument that Megatron builds the model from.

    These are the fields of its model configuration and whatever else shapes the model.
    ``--use-checkpoint-args`` alone restores a fixed list that lacks some (QK norm, for one), and
    would silently build another model.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = {field.name for field in fields(ModelParallelConfig)}
    names = {field.name for field in fields(TransformerConfig)}
    names |= {name for name in vars(saved) if shapes_the_model(name)}
    names -= {*layout, *CPU_DEFAULTS, "topk"}
    names.add("vocab_size")
    settings = {name: value for name, value in vars(saved).items() if name in names}
    for name, value in settings.items():
        if isinstance(value, StandIn):
            raise CheckpointError(
                f"the checkpoint's {name} is a {type(value).__name__}, which this version of "
                "Megatron lacks; use the version that trained the model"
            )
    return settings


def _check_weights(model: Any, directory: Path) -> None:
    """Refuse a checkpoint with weights that the model lacks, which Megatron would skip."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    wanted = {getattr(item, "key", name) for name, item in model.sharded_state_dict().items()}
    stored = set(load_tensors_metadata(str(directory)))
    left = sorted(k for k in stored - wanted if not k.startswith(("optimizer", "chained_")))
    if left:
        raise CheckpointError(
            f"{directory} holds weights that its own settings do not account for: "
            f"{', '.join(left[:5])}"
        )


def _load(directory: Path, saved: Namespace, flags: list[str], device: str) -> tuple[Any, Any, Any]:
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model
    from topk_megatron.train.main import be_one_process, parse

    be_one_process()
    sys.argv = [sys.argv[0], *flags]
    skip_dataset_compiler()
    args, config = parse(device, _model_settings(saved))
    initialize_megatron()
    runtime = TopKRuntime(config, probing=False)
    model = build_model(args, runtime).eval()
    _check_weights(model, directory)
    load_checkpoint([model], None, None)
    runtime.begin_step(max(0, args.iteration - 1))
    return args, model, runtime
