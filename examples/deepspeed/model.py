"""Opens a TopK LM's folder for training, and writes the trained model, weight by weight.

Under ZeRO-3 no GPU ever holds the whole model; rank 0 reads it into its node's memory.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.files import new_folder, read_object
from topk_megatron.hf.export import check_config
from topk_megatron.hf.model import load_model, load_tokenizer
from topk_megatron.hf.safetensors import INDEX, ShardWriter, TensorPlan, plan_shards

RECORD = "deepspeed_training.json"
_SHARD_BYTES = 2 * 2**30


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the config.json of a TopK LM that this example can train.

    Raises:
        CheckpointError: The folder does not hold a TopK LM.
        ConfigError: The model has experts.
    """
    config = read_object(folder / "config.json")
    if config.get("model_type") != "topk_lm":
        raise CheckpointError(
            f"{folder} is not a TopK LM folder: its model_type is {config.get('model_type')!r}, "
            "expected 'topk_lm'; make one with tools/convert_checkpoint.py to-hf"
        )
    check_config(config)
    if config.get("moe_layers"):
        raise ConfigError(
            f"{folder} has experts, which this example does not train: a rank that sends no token "
            "to an expert would fall out of step with the others; train it with Megatron"
        )
    return config


def open_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Open the folder's own tokenizer.

    Raises:
        CheckpointError: There is no tokenizer, it has no end token, or it belongs to another model.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None or len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: expected a tokenizer with at most {vocab_size} tokens and an end token, "
            f"found {len(tokenizer)} tokens and end token {tokenizer.eos_token_id}; put the "
            "tokenizer that the model was trained with into the folder"
        )
    return tokenizer


def open_model(folder: Path, dtype: str, settings: dict[str, Any]) -> Any:
    """Open the model with its weights; ZeRO-3 in DeepSpeed's settings splits it over the ranks.

    Raises:
        CheckpointError: The folder cannot be opened, or its weights do not fit its configuration.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # While this object lives, transformers splits what it opens if the settings ask for it.
    splitting = HfDeepSpeedConfig(settings)
    accelerator: Any = get_accelerator()
    model = load_model(folder, dtype=dtype, device=accelerator.current_device_name())
    del splitting
    return model


def write_folder(engine: Any, source: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the trained model as a folder like `source`; every rank calls it.

    Code, tokenizer, model card and settings come from `source`; the weights keep the dtype of
    training. `record` goes into ``deepspeed_training.json``.

    Raises:
        CheckpointError: `target` exists, or the disk is full.
    """
    first = engine.global_rank == 0
    named = list(engine.module.named_parameters())
    with new_folder(target) if first else nullcontext(target) as folder:
        writer = None
        if first:
            plans = [TensorPlan(name, _shape(p), p.dtype) for name, p in named]
            writer = ShardWriter(folder, plan_shards(plans, _SHARD_BYTES))
        for name, parameter in named:
            with _whole(parameter) as tensor:
                if writer is not None:
                    writer.add(name, tensor.detach().cpu())
        if writer is not None:
            writer.finish()
            _copy_rest(source, folder, named[0][1].dtype, record)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:
    """Gather a parameter from the ranks if it is split over them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        yield parameter.data


def _copy_rest(source: Path, folder: Path, dtype: torch.dtype, record: dict[str, Any]) -> None:
    """Copy all but the weights; config.json comes last, so that no unfinished folder opens."""
    for file in sorted(source.iterdir()):
        is_weights = file.name == INDEX or file.match("model*.safetensors")
        if file.is_file() and not is_weights and file.name not in ("config.json", "README.md"):
            shutil.copyfile(file, folder / file.name)
    card = source / "README.md"
    said = f"\nTrained further with DeepSpeed for {record['steps']} steps; see `{RECORD}`.\n"
    (folder / card.name).write_text((card.read_text() if card.is_file() else "") + said)
    _write(folder / RECORD, record)
    config = {**read_object(source / "config.json"), "dtype": str(dtype).removeprefix("torch.")}
    _write(folder / "config.json", config)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
