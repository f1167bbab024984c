"""Converts a Hugging Face folder into a torch_dist checkpoint from which Megatron continues."""

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.checkpoint.directory import TRACKER
from topk_megatron.checkpoint.writer import Chunk, write_torch_dist
from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.files import new_folder, refuse_existing
from topk_megatron.hf.export import PADDING_FILE, Progress
from topk_megatron.hf.folder_source import HuggingFaceSource
from topk_megatron.hf.mapping import EXTRA_STATE
from topk_megatron.hf.pieces import SPLITS, Piece, pieces, shapes
from topk_megatron.hf.safetensors import SafetensorsFile
from topk_megatron.hf.tokenizer_export import SENTENCEPIECE

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Old versions of transformers save these, although they follow from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """How to convert to Megatron.

    Attributes:
        tp: tensor-parallel size, which decides only how the vocabulary is padded.
        pp: pipeline-parallel size, which is only recorded.
        divisible_by: Megatron's ``--make-vocab-size-divisible-by``; None keeps that of the run.
        tokenizer: whether to copy the tokenizer.
    """

    tp: int = 1
    pp: int = 1
    divisible_by: int | None = None
    tokenizer: bool = True


def restore_checkpoint(
    load: Path,
    save: Path,
    settings: RestoreSettings,
    *,
    progress: Callable[[int], Progress] | None = None,
) -> HuggingFaceSource:
    """Convert the folder `load` into the new checkpoint directory `save`.

    Raises:
        CheckpointError: the folder cannot be converted; nothing is left at `save`.
        ConfigError: a parallel size is less than 1.
    """
    for name in ("tp", "pp"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    refuse_existing(save)
    source = HuggingFaceSource(load)
    with new_folder(save) as folder:
        if settings.tokenizer:
            _copy_tokenizer(source, folder, save.absolute())
        _complete_args(source, settings)
        padded = source.args.padded_vocab_size
        chunks = list(_chunks(source, padded))
        _check_names(source)
        if progress is not None:
            total = sum(chunk.sizes.numel() * chunk.dtype.itemsize for chunk in chunks)
            chunks = _watched(chunks, progress(total))
        directory = folder / f"iter_{source.iteration:07d}"
        write_torch_dist(directory, chunks, _common(source), list(_extra_states(source)))
        (folder / TRACKER).write_text(str(source.iteration))
    return source


def _copy_tokenizer(source: HuggingFaceSource, folder: Path, final: Path) -> None:
    """Copy the tokenizer to the checkpoint, and make the arguments point to it."""
    files = [source.directory / name for name in _TOKENIZER_FILES]
    files = [file for file in files if file.is_file()]
    one_file = source.args.tokenizer_type == SENTENCEPIECE
    needed = (
        {"tokenizer.model"} if one_file else {"tokenizer.json", "tokenizer.model", "vocab.json"}
    )
    if not needed & {file.name for file in files}:
        raise CheckpointError(
            f"{source.directory} has no tokenizer ({' or '.join(sorted(needed))}); copy it there, "
            "or use --no-tokenizer and give --tokenizer-model when training"
        )
    (folder / "tokenizer").mkdir()
    for file in files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    where = final / "tokenizer"
    source.args.tokenizer_model = str(where / "tokenizer.model" if one_file else where)
    if not source.is_export:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
        source.args.tokenizer_vocab_size = len(tokenizer)


def _complete_args(source: HuggingFaceSource, settings: RestoreSettings) -> None:
    """Set the arguments that depend on the layout or on what the checkpoint lacks."""
    args: Namespace = source.args
    if not hasattr(args, "tokenizer_vocab_size"):
        args.tokenizer_vocab_size = source.config["vocab_size"]
    if settings.divisible_by is not None:
        args.make_vocab_size_divisible_by = settings.divisible_by
    multiple = args.make_vocab_size_divisible_by * settings.tp
    vars(args).update(
        padded_vocab_size=-(-args.tokenizer_vocab_size // multiple) * multiple,
        tensor_model_parallel_size=settings.tp,
        pipeline_model_parallel_size=settings.pp,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        data_parallel_size=1,
        world_size=settings.tp * settings.pp,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        no_save_optim=True,
        no_save_rng=True,
    )


def _common(source: HuggingFaceSource) -> dict[str, Any]:
    return {
        "args": source.args,
        "checkpoint_version": 3.0,
        "iteration": source.iteration,
        "num_floating_point_operations_so_far": 0.0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _chunks(source: HuggingFaceSource, padded: int) -> Iterator[Chunk]:
    names = source.weights.names
    for piece, shape in shapes(source.config, padded).items():
        lost = [name for name in piece.huggingface if name not in names]
        if lost:
            raise CheckpointError(
                f"{source.directory} has no {lost[0]}, which its config.json asks for"
            )
        _check_shapes(source, piece, shape)
        key, outer, lead = _place(source, piece)
        dtype = source.weights.dtype(piece.huggingface[0])
        load = _loader(source, piece, padded)
        yield Chunk(key=key, size=(*outer, *shape), lead=lead, dtype=dtype, load=load)


def _check_shapes(source: HuggingFaceSource, piece: Piece, shape: tuple[int, ...]) -> None:
    expected = SPLITS[piece.row.split].shapes(shape, source.config)
    for name, wanted in zip(piece.huggingface, expected, strict=True):
        if source.weights.shape(name) != wanted:
            raise CheckpointError(
                f"{source.directory}: {name} has shape {list(source.weights.shape(name))} where "
                f"its config.json says {list(wanted)}"
            )


def _is_stacked(args: Namespace) -> bool:
    """Megatron's rule (transformer_block.py): layers of one kind share one tensor."""
    frequency = args.moe_layer_freq
    return isinstance(frequency, int) and frequency <= 1


def _place(source: HuggingFaceSource, piece: Piece) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return the key, leading sizes and leading indices of a piece in the checkpoint."""
    name, layer = piece.row.megatron, piece.layer
    if layer is None:
        return name, (), ()
    engine = source.args.transformer_impl == "transformer_engine"
    if piece.row.alias and engine and layer in source.config["moe_layers"] and "mlp" in name:
        name = piece.row.alias  # a norm is fused only into a linear layer
    outer, lead = (), ()
    if piece.expert is not None:
        outer, lead = (source.config["num_experts"],), (piece.expert,)
    if not _is_stacked(source.args):
        return f"decoder.layers.{layer}.{name}", outer, lead
    return (
        f"decoder.layers.{name}",
        (source.config["num_hidden_layers"], *outer),
        (layer, *lead),
    )


def _extra_states(source: HuggingFaceSource) -> Iterator[str]:
    """Yield the keys of the empty state that Megatron expects of every linear layer."""
    for piece in pieces(source.config):
        module, _, kind = piece.row.megatron.rpartition(".")
        if piece.layer is None or kind != "weight" or ".linear_" not in module:
            continue
        key, outer, lead = _place(source, piece)
        place, count = (".".join(map(str, numbers)) for numbers in (lead or (0,), outer or (1,)))
        yield f"{key.removesuffix('.weight')}{EXTRA_STATE}/shard_{place}_{count}"


def _loader(source: HuggingFaceSource, piece: Piece, padded: int) -> Callable[[], Tensor]:
    def load() -> Tensor:
        parts = [source.weights.read(name) for name in piece.huggingface]
        whole = SPLITS[piece.row.split].join(parts, source.config)
        if piece.row.split != "vocabulary" or whole.shape[0] == padded:
            return whole
        return torch.cat([whole[:padded], _padding(source, piece, padded, whole)])

    return load


def _padding(source: HuggingFaceSource, piece: Piece, padded: int, whole: Tensor) -> Tensor:
    """Return the rows of the vocabulary's padding: the exported ones, then zeros."""
    count = max(0, padded - whole.shape[0])
    rows = whole.new_zeros(count, whole.shape[1])
    path = source.directory / PADDING_FILE
    if path.is_file():
        kept = SafetensorsFile(path).read(piece.huggingface[0])[:count]
        rows[: len(kept)] = kept
    return rows


def _check_names(source: HuggingFaceSource) -> None:
    used = {name for piece in pieces(source.config) for name in piece.huggingface}
    left = sorted(n for n in source.weights.names - used if not _DERIVED.fullmatch(n))
    if left == ["lm_head.weight"] and source.config["tie_word_embeddings"]:
        same = source.weights.read("model.embed_tokens.weight")
        if torch.equal(source.weights.read("lm_head.weight"), same):
            return
    if left:
        raise CheckpointError(
            f"{source.directory} holds {left[0]}, which the mapping does not know for this model; "
            "converting without it would give another model"
        )


def _watched(chunks: list[Chunk], advance: Progress) -> list[Chunk]:
    """Return the same chunks, each of which reports when it is loaded."""

    def watch(chunk: Chunk) -> Chunk:
        def load() -> Tensor:
            tensor = chunk.load()
            advance(tensor.nbytes)
            return tensor

        return Chunk(chunk.key, chunk.size, chunk.lead, chunk.dtype, load)

    return [watch(chunk) for chunk in chunks]
