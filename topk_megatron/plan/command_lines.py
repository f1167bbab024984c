"""Translates pretraining flags into a model's shape and a layout, and a layout into flags."""

import argparse
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from topk_megatron.checkpoint.flags import OTHER_PARTS
from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape
from topk_megatron.train.arguments import add_topk_arguments

_NUMBERS = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"),
    *("kv-channels", "vocab-size", "seq-length", "max-position-embeddings"),
    *("micro-batch-size", "global-batch-size", "train-iters"),
)
_SWITCHES = (
    *("swiglu", "untie-embeddings-and-output-weights", "group-query-attention"),
    *("disable-bias-linear", "add-qkv-bias", "qk-layernorm", "sequence-parallel"),
)
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")
# These change a model or its schedule in ways that the planner does not count.
_REFUSED = (
    *(f"--{name.replace('_', '-')}" for name in ("num_experts", *OTHER_PARTS)),
    *("--context-parallel-size", "--fp8-format", "--fp4-format", "--use-torch-fsdp2"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
    *("--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers"),
    *("--decoder-last-pipeline-num-layers", "--account-for-embedding-in-pipeline-split"),
    *("--account-for-loss-in-pipeline-split", "--use-tp-pp-dp-mapping"),
)
# The flags that a plan chooses, and how many words follow each.
_LAYOUT_FLAGS = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--sequence-parallel": 0,
    "--recompute-granularity": 1,
    "--recompute-method": 1,
    "--recompute-num-layers": 1,
    "--recompute-activations": 0,
    "--recompute-modules": -1,
    "--use-distributed-optimizer": 0,
    "--overlap-grad-reduce": 0,
    "--overlap-param-gather": 0,
    "--topk-sparse-p2p": 0,
    "--topk-sparse-save": 0,
    "--bf16": 0,
    "--fp16": 0,
}


def read_flags(path: Path) -> list[str]:
    """Return the words of an argument file; ``#`` begins a comment.

    Raises:
        ConfigError: If the file cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the argument file {path} cannot be read: {error}") from error
    return shlex.split(text, comments=True)


def shape_of(flags: Sequence[str]) -> Shape:
    """Return the model that pretraining flags describe; ignores flags that do not affect it.

    Raises:
        ConfigError: If a size is missing or does not divide, or if plans do not cover the model.
    """
    for flag in _REFUSED:
        if any(word == flag or word.startswith(f"{flag}=") for word in flags):
            raise ConfigError(f"{flag} is not planned for; docs/planning.md lists what is")
    parsed = _parse(flags)
    for name in _REQUIRED:
        if getattr(parsed, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is required for a plan")
    for name in _NUMBERS:
        value = getattr(parsed, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    return _build(parsed)


def layout_in(flags: Sequence[str], gpus: int | None = None) -> Layout:
    """Return the layout that the flags themselves ask for.

    Args:
        flags: Pretraining flags.
        gpus: GPUs of the whole job; None for one replica.

    Raises:
        ConfigError: If a size is below 1, or `gpus` is not a multiple of a replica.
    """
    parsed = _parse(flags)
    tp, pp = parsed.tensor_model_parallel_size, parsed.pipeline_model_parallel_size
    if tp < 1 or pp < 1:
        raise ConfigError(f"parallel sizes must be at least 1, got TP {tp} and PP {pp}")
    gpus = tp * pp if gpus is None else gpus
    if gpus % (tp * pp):
        raise ConfigError(f"{gpus} GPUs are not a multiple of TP {tp} x PP {pp}")
    return Layout(
        tp=tp,
        pp=pp,
        dp=gpus // (tp * pp),
        recompute=parsed.recompute_granularity == "full",
        sparse_p2p=parsed.topk_sparse_p2p,
        sparse_save=parsed.topk_sparse_save,
    )


def layout_flags(layout: Layout) -> list[str]:
    """Return the pretraining flags that select this layout."""
    flags = ["--bf16"]
    if layout.tp > 1:
        flags += ["--tensor-model-parallel-size", str(layout.tp), "--sequence-parallel"]
    if layout.pp > 1:
        flags += ["--pipeline-model-parallel-size", str(layout.pp)]
    flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if layout.recompute:
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        flags += ["--recompute-num-layers", "1"]
    flags += ["--topk-sparse-p2p"] if layout.sparse_p2p else []
    flags += ["--topk-sparse-save"] if layout.sparse_save else []
    return flags


def without_layout(flags: Sequence[str]) -> list[str]:
    """Return the flags of an argument file without those that a plan chooses."""
    kept: list[str] = []
    for group in grouped(flags):
        flag, _, joined = group[0].partition("=")
        following = _LAYOUT_FLAGS.get(flag)
        if following is None:
            kept += group
        elif following >= 0 and len(group) - 1 + bool(joined) != following:
            raise ConfigError(
                f"{flag} takes {following} words, got {' '.join(group[1:]) or 'none'}"
            )
    return kept


def grouped(words: Iterable[str]) -> Iterator[list[str]]:
    """Yield each flag with the words that follow it."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _parse(flags: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _raise_usage  # pyright: ignore[reportAttributeAccessIssue]
    for name in _NUMBERS:
        parser.add_argument(f"--{name}", type=int)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    # Megatron's defaults.
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--recompute-granularity")
    add_topk_arguments(parser)
    return parser.parse_known_args(flags)[0]


def _raise_usage(message: str) -> NoReturn:
    raise ConfigError(message)


def _build(parsed: Any) -> Shape:
    hidden, heads, ffn = parsed.hidden_size, parsed.num_attention_heads, parsed.ffn_hidden_size
    if ffn is None:  # as Megatron does
        ffn = int(4 * hidden * 2 / 3 / 64) * 64 if parsed.swiglu else 4 * hidden
    if parsed.kv_channels is None and hidden % heads:
        raise ConfigError(
            f"--hidden-size {hidden} must be divisible by --num-attention-heads {heads}"
        )
    groups = (parsed.num_query_groups or heads) if parsed.group_query_attention else heads
    if heads % groups:
        raise ConfigError(
            f"--num-attention-heads {heads} must be divisible by --num-query-groups {groups}"
        )
    learned = parsed.position_embedding_type == "learned_absolute"
    if learned and parsed.max_position_embeddings is None:
        raise ConfigError("--max-position-embeddings is required with learned positions")
    micro = parsed.micro_batch_size or 1
    return Shape(
        layers=parsed.num_layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        groups=groups,
        head_size=parsed.kv_channels or hidden // heads,
        vocabulary=parsed.vocab_size,
        vocabulary_multiple=parsed.make_vocab_size_divisible_by,
        positions=parsed.max_position_embeddings if learned else 0,
        gated=parsed.swiglu,
        tied=not parsed.untie_embeddings_and_output_weights,
        norm_biases=parsed.normalization != "RMSNorm",
        biases=not parsed.disable_bias_linear,
        qkv_biases=parsed.add_qkv_bias,
        qk_norm=parsed.qk_layernorm,
        dropout=parsed.hidden_dropout > 0,
        topk=TopKConfig.from_args(parsed),
        sequence=parsed.seq_length,
        micro_batch=micro,
        global_batch=parsed.global_batch_size or micro,
        iterations=parsed.train_iters,
    )
