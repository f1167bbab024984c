"""Exports Megatron checkpoints as Hugging Face folders that open without this package."""

import filecmp
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topk_megatron.checkpoint.directory import (
    is_complete,
    iterations,
    open_checkpoint,
    refuse_fsdp,
)
from topk_megatron.checkpoint.flags import is_recorded
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.errors import CheckpointError
from topk_megatron.files import new_folder, refuse_existing, write_json
from topk_megatron.hf import modeling
from topk_megatron.hf.card import model_card
from topk_megatron.hf.megatron_source import MegatronSource
from topk_megatron.hf.model import TRAINING_FILE
from topk_megatron.hf.pieces import SPLITS, Piece
from topk_megatron.hf.safetensors import ShardWriter, TensorPlan, plan_shards
from topk_megatron.hf.tokenizer_export import export_tokenizer, tokenizer_size

TRAJECTORY_FILE = "trajectory.json"
PADDING_FILE = "vocabulary_padding.safetensors"
FORMAT_VERSION = 1
_CODE = Path(modeling.__file__).parent
_AUTO_MAP = {
    "AutoConfig": "configuration_topk.TopKLMConfig",
    "AutoModel": "modeling_topk.TopKLMModel",
    "AutoModelForCausalLM": "modeling_topk.TopKLMForCausalLM",
}
Progress = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How to export.

    Attributes:
        dense: whether the checkpoint is one of stock Megatron, without TopK settings.
        dtype: one of `topk_megatron.hf.model.DTYPES`; None keeps the checkpoint's.
        shard_size: the largest safetensors file, in bytes.
        tokenizer_model: path of the tokenizer; None is where the training run found it.
        tokenizer: whether to export the tokenizer.
    """

    dense: bool = False
    dtype: str | None = None
    shard_size: int = 2 * 2**30
    tokenizer_model: str | None = None
    tokenizer: bool = True


def export_checkpoint(
    load: Path,
    save: Path,
    settings: ExportSettings,
    *,
    iteration: int | None = None,
    progress: Callable[[int], Progress] | None = None,
) -> MegatronSource:
    """Export one iteration to the new folder `save`.

    Args:
        load: the directory that was given to Megatron's ``--save``.
        save: the folder to create.
        settings: how to export.
        iteration: which checkpoint; None is the latest.
        progress: takes the total of bytes, returns a function that takes each number of bytes done.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: the checkpoint cannot be exported; nothing is left at `save`.
        DataError: the tokenizer cannot be opened; nothing is left at `save`.
    """
    refuse_existing(save)
    reader = open_checkpoint(load, iteration) if load.is_dir() else None
    if reader is None:
        raise CheckpointError(f"{load} holds no complete torch_dist checkpoint")
    source = MegatronSource(reader, dense=settings.dense, vocab_size=_vocab_size(settings))
    with new_folder(save) as folder:
        write_folder(source, folder, settings, progress)
    return source


def export_trajectory(
    load: Path,
    save: Path,
    settings: ExportSettings,
    *,
    progress: Callable[[int], Progress] | None = None,
) -> list[dict[str, Any]]:
    """Export every complete iteration of `load` into the new folder `save`.

    A file that equals its predecessor is a hard link to it, where the file system has them.

    Returns:
        The revisions as in trajectory.json, in ascending order: name, iteration, tokens_seen, k.

    Raises:
        CheckpointError: an iteration cannot be exported; nothing is left at `save`.
        DataError: the tokenizer cannot be opened; nothing is left at `save`.
    """
    refuse_existing(save)
    complete = {n: path for n, path in sorted(iterations(load).items()) if is_complete(path)}
    if not complete:
        raise CheckpointError(f"{load} holds no complete torch_dist checkpoint")
    vocab_size = _vocab_size(settings)
    revisions: list[dict[str, Any]] = []
    with new_folder(save) as folder:
        previous: Path | None = None
        for number, directory in complete.items():
            reader = CheckpointReader(directory)
            refuse_fsdp(reader)
            source = MegatronSource(reader, dense=settings.dense, vocab_size=vocab_size)
            revision = folder / f"iter_{number:07d}"
            revision.mkdir()
            write_folder(source, revision, settings, progress)
            if previous is not None:
                _link_equal_files(previous, revision)
            previous = revision
            revisions.append(
                {
                    "name": revision.name,
                    "iteration": number,
                    "tokens_seen": source.tokens_seen,
                    "k": source.config["topk"]["k"],
                }
            )
        manifest = {"format_version": FORMAT_VERSION, "revisions": revisions}
        write_json(folder / TRAJECTORY_FILE, manifest)
    return revisions


def _link_equal_files(previous: Path, revision: Path) -> None:
    for path in sorted(revision.iterdir()):
        before = previous / path.name
        if before.is_file() and filecmp.cmp(before, path, shallow=False):
            link = path.with_name(f"{path.name}.link")
            with suppress(OSError):  # a file system without hard links keeps the copy
                os.link(before, link)
                link.replace(path)


def _vocab_size(settings: ExportSettings) -> int | None:
    """Return the size of the tokenizer that the user names, in case the checkpoint lacks it."""
    model = settings.tokenizer_model
    return None if model is None else tokenizer_size(model)


def write_folder(
    source: MegatronSource,
    folder: Path,
    settings: ExportSettings,
    progress: Callable[[int], Progress] | None = None,
) -> None:
    """Write all files, config.json last, so that an unfinished folder never opens."""
    tokens: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if settings.tokenizer:
        tokens = _write_tokenizer(source, folder, settings)
    _write_weights(source, folder, settings, progress)
    for file in sorted(_CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)
    training = training_record(source)
    config = full_config(source, settings, tokens)
    write_json(folder / TRAINING_FILE, training, sort_keys=True, allow_nan=True)
    (folder / "README.md").write_text(model_card(config, training))
    generation = {"do_sample": False, **{k: v for k, v in tokens.items() if v is not None}}
    write_json(folder / "generation_config.json", generation, sort_keys=True)
    check_config(config)
    write_json(folder / "config.json", config, sort_keys=True, allow_nan=True)


def full_config(
    source: MegatronSource, settings: ExportSettings, tokens: dict[str, int | None]
) -> dict[str, Any]:
    """Return the content of config.json."""
    dtype = settings.dtype or str(source.dtype).removeprefix("torch.")
    return {
        "architectures": ["TopKLMForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": "topk_lm",
        "dtype": dtype,
        **source.config,
        "rms_norm_eps": source.config["norm_eps"],
        "use_cache": True,
        **tokens,
    }


def check_config(config: dict[str, Any]) -> None:
    """Let the model's own code check its configuration.

    Raises:
        CheckpointError: the model would not open.
    """
    from topk_megatron.hf.modeling.configuration_topk import TopKLMConfig

    try:
        TopKLMConfig(**{k: v for k, v in config.items() if k not in ("auto_map", "model_type")})
    except ValueError as error:
        raise CheckpointError(f"the exported model would not open: {error}") from error


def training_record(source: MegatronSource) -> dict[str, Any]:
    """Return topk_training.json: what the way back needs, less what depends on the layout."""
    args = source.reader.args
    return {
        "format_version": FORMAT_VERSION,
        "iteration": source.iteration,
        "tokens_seen": source.tokens_seen,
        "topk": None if source.topk is None else source.topk.to_dict(),
        "tokenizer_type": getattr(args, "tokenizer_type", None),
        "padded_vocab_size": source.padded_vocabulary,
        "megatron_args": recorded_args(args),
    }


def recorded_args(args: Namespace) -> dict[str, Any]:
    """Return the run's arguments without layout, machine and logging; dtypes become text."""
    kept = {k: v for k, v in vars(args).items() if is_recorded(k) and k != "topk"}
    return {name: _plain(name, value) for name, value in sorted(kept.items())}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    try:
        json.dumps(value)
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint's argument {name} is a {type(value).__name__}, which cannot be "
            "recorded; list it in topk_megatron/checkpoint/flags.py if it describes the machine"
        ) from error
    return value


def _write_tokenizer(
    source: MegatronSource, folder: Path, settings: ExportSettings
) -> dict[str, int | None]:
    args = source.reader.args
    model = settings.tokenizer_model or args.tokenizer_model or ""
    length = source.config["max_position_embeddings"]
    tokens = export_tokenizer(args.tokenizer_type, model, folder, length)
    size = tokens.pop("vocab_size")
    if size != source.config["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer {model} has {size} tokens, the checkpoint was trained with "
            f"{source.config['vocab_size']}; give the one that it was trained with: "
            "--tokenizer-model"
        )
    return tokens


def _write_weights(
    source: MegatronSource,
    folder: Path,
    settings: ExportSettings,
    progress: Callable[[int], Progress] | None,
) -> None:
    plans = [plan for piece in source.pieces() for plan in _plans(source, piece, settings)]
    advance = progress(sum(plan.num_bytes for plan in plans)) if progress else None
    with ShardWriter(folder, plan_shards(plans, settings.shard_size)) as writer:
        for piece in source.pieces():
            parts = source.read_parts(piece)
            for plan, part in zip(_plans(source, piece, settings), parts, strict=True):
                writer.add(plan.name, part.to(plan.dtype))
                if advance is not None:
                    advance(plan.num_bytes)
    _write_padding(source, folder)


def _plans(source: MegatronSource, piece: Piece, settings: ExportSettings) -> list[TensorPlan]:
    dtype = source.stored_dtype(piece)
    if settings.dtype is not None and not piece.row.buffer:
        dtype = getattr(torch, settings.dtype)
    shapes = SPLITS[piece.row.split].shapes(source.shape(piece), source.config)
    return [TensorPlan(n, s, dtype) for n, s in zip(piece.huggingface, shapes, strict=True)]


def _write_padding(source: MegatronSource, folder: Path) -> None:
    """Write the padding rows of the embedding and output, which only Megatron's loss sees.

    Megatron pads the vocabulary for tensor parallelism and trains those rows too. They are kept
    next to the model, so that the way back is bitwise.
    """
    first = source.config["vocab_size"]
    if source.padded_vocabulary == first:
        return
    rows = [piece for piece in source.pieces() if piece.row.split == "vocabulary"]
    shape = (source.padded_vocabulary - first, source.config["hidden_size"])
    plans = [TensorPlan(p.huggingface[0], shape, source.stored_dtype(p)) for p in rows]
    with ShardWriter(folder, [plans], stem=PADDING_FILE.removesuffix(".safetensors")) as writer:
        for plan, piece in zip(plans, rows, strict=True):
            writer.add(plan.name, source.read(piece)[first:])
