"""Checkpoints of random weights as Megatron writes them, made without Megatron or training."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.checkpoint.directory import TRACKER
from topk_megatron.checkpoint.writer import Chunk, write_torch_dist
from topk_megatron.config import TopKConfig
from topk_megatron.hf.families import dense_config
from topk_megatron.hf.flag_mapping import write_args
from topk_megatron.hf.folder_source import UNTRAINED
from topk_megatron.hf.pieces import shapes


def synthetic_config(**changes: Any) -> dict[str, Any]:
    """A small Llama's configuration, as the converter has it."""
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return dense_config({**llama, **changes})


def write_synthetic_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    iteration: int = 10,
    topk: TopKConfig | None = None,
    tokenizer_model: Path | None = None,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, tuple[int, ...]] | None = None,
    arguments: dict[str, Any] | None = None,
) -> Path:
    """Write one iteration into `directory`, the weights a chunk at a time.

    Args:
        directory: what would be Megatron's ``--save``.
        config: of the model; experts are not made.
        iteration: its number.
        topk: TopK settings; None leaves them out, as stock Megatron does.
        tokenizer_model: a sentencepiece model, recorded in the arguments.
        dtype: of all weights.
        extra: more tensors by key and shape, to be wrong with.
        arguments: more of Megatron's arguments.

    Returns:
        The directory of the iteration.
    """
    chunks = [*_chunks(config, dtype)]
    chunks += [Chunk(k, s, (), dtype, _random(s)) for k, s in (extra or {}).items()]
    args = Namespace(
        **write_args(config),
        **UNTRAINED,
        params_dtype=dtype,
        seq_length=config["max_position_embeddings"],
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=None if tokenizer_model is None else str(tokenizer_model),
        tokenizer_vocab_size=config["vocab_size"],
    )
    if topk is not None:
        args.topk = topk.to_dict()
    vars(args).update(consumed_train_samples=8 * iteration, **(arguments or {}))
    common = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
    target = directory / f"iter_{iteration:07d}"
    write_torch_dist(target, chunks, common, [])
    (directory / TRACKER).write_text(str(iteration))
    return target


def _chunks(config: dict[str, Any], dtype: torch.dtype) -> Iterator[Chunk]:
    layers = config["num_hidden_layers"]
    for piece, shape in shapes(config, config["vocab_size"]).items():
        name = piece.row.megatron
        if piece.layer is None:
            yield Chunk(name, shape, (), dtype, _random(shape))
        else:
            key, size = f"decoder.layers.{name}", (layers, *shape)
            yield Chunk(key, size, (piece.layer,), dtype, _random(shape))


def _random(shape: tuple[int, ...]) -> Any:
    def load() -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator)

    return load
