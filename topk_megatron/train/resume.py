"""Decides whether a run may continue from a checkpoint, and with which settings."""

from argparse import Namespace
from pathlib import Path

from topk_megatron.checkpoint.directory import names_release, open_checkpoint
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.config import TopKConfig, anneal_end_of, parse_layers
from topk_megatron.errors import CheckpointError, ConfigError, UnsafeCheckpointError


def open_resume(args: Namespace) -> CheckpointReader | None:
    """Open the checkpoint that this run continues from; return None if there is none.

    Rank 0 also repairs a tracker that names no complete checkpoint, compares hashes under
    ``--verify-integrity`` (which reads every byte), and checks that Megatron's loader finds no code
    in the checkpoint. The other ranks wait for rank 0 when the job's process groups are made.

    Raises:
        CheckpointError: if the checkpoint is damaged, or the run needs one and there is none.
        UnsafeCheckpointError: if opening the checkpoint could run code.
    """
    if args.load is None:
        return None
    first = args.rank == 0
    hashes = first and args.verify_integrity
    reader = open_checkpoint(
        Path(args.load),
        args.ckpt_step,
        write=first,
        hashes=hashes,
        fsdp=args.ckpt_format == "fsdp_dtensor",
    )
    if reader is None:
        _check_needed(args)
        return None
    if first and not args.topk_trust_checkpoint:
        check_trust(reader)
    return reader


def check_resume(args: Namespace, config: TopKConfig, resume: CheckpointReader | None) -> None:
    """Compare the checkpoint's vocabulary and settings with this run's.

    Raises:
        CheckpointError: if the vocabulary differs, or the TopK settings do and are not overridden.
    """
    if resume is not None:
        _check_vocabulary(args, resume.args, resume.directory)
        _check_topk(args, config, resume.args, resume.directory)


def check_trust(reader: CheckpointReader) -> None:
    """Refuse a checkpoint in which Megatron's loader could find code to run.

    Raises:
        UnsafeCheckpointError: names the object and the flag that skips this check.
    """
    try:
        reader.check_objects()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"{error}; give --topk-trust-checkpoint if you trust whoever wrote the checkpoint"
        ) from error


_FLAGS = (
    "k",
    "layers",
    "mode",
    "anneal",
    "anneal_start_k",
    "anneal_begin",
    "anneal_end",
    "site",
    "mlp_k",
    "mlp_groups",
)


def choose_settings(args: Namespace, resume: CheckpointReader | None) -> TopKConfig:
    """Build this run's TopK settings, which nothing else does.

    They come from the flags and, under ``--use-checkpoint-args``, from the checkpoint, whose values
    the ``--topk-…`` flags on the command line override. If no end of annealing is given, a resumed
    run keeps the end that it started with, even if the run is made longer.

    Args:
        args: Megatron's parsed arguments, not yet validated.
        resume: the checkpoint that ``--load`` names, if there is one.

    Raises:
        ConfigError: if a size is missing or a setting is out of range.
    """
    settings = None if resume is None else getattr(resume.args, "topk", None)
    before = None if settings is None else TopKConfig.from_dict(settings)
    if args.use_checkpoint_args and before is not None:
        return _merged(args, before)
    if args.use_checkpoint_args and resume is not None:
        # A stock Megatron checkpoint brings the sizes of its model, and no TopK settings.
        args = Namespace(**{**vars(args), **_sizes(resume.args)})
    for name in ("hidden_size", "num_layers"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is required")
    config = TopKConfig.from_args(args)
    if config.anneal == "constant" or args.topk_anneal_end is not None or args.finetune:
        return config
    if before is not None:
        same_but_the_end = {**before.to_dict(), "anneal_end": config.anneal_end}
        return before if same_but_the_end == config.to_dict() else config
    return config


def _sizes(saved: Namespace) -> dict[str, int]:
    return {name: getattr(saved, name) for name in ("hidden_size", "num_layers")}


def _merged(args: Namespace, saved: TopKConfig) -> TopKConfig:
    """Return the checkpoint's settings, with those on the command line replaced."""
    given = {name: getattr(args, f"topk_{name}") for name in _FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"], saved.num_layers)
    before = saved.to_dict()
    if given.get("anneal") == "constant":
        before.update(anneal_start_k=None, anneal_begin=0, anneal_end=0)
    elif "anneal" in given and saved.anneal == "constant":
        given["anneal_end"] = anneal_end_of(args)
    if given.get("site") == "residual":
        before.update(mlp_k=None, mlp_groups=None)
    return TopKConfig.from_dict({**before, **given})


def _check_needed(args: Namespace) -> None:
    """Refuse to continue with random weights where the run only makes sense with a checkpoint."""
    if names_release(Path(args.load)):
        return
    for flag in ("finetune", "skip_train", "use_checkpoint_args"):
        if getattr(args, flag):
            raise CheckpointError(
                f"--{flag.replace('_', '-')} needs a checkpoint, but {args.load} holds no complete "
                "one; check --load"
            )


def _check_vocabulary(args: Namespace, saved: Namespace, directory: Path) -> None:
    before = getattr(saved, "tokenizer_vocab_size", None)
    now = args.tokenizer_vocab_size
    if before is not None and before != now:
        raise CheckpointError(
            f"the tokenizer does not fit the checkpoint: {directory} was trained with {before} "
            f"pieces ({saved.tokenizer_model}), but {args.tokenizer_model} has {now}; give the "
            "tokenizer that the checkpoint was trained with"
        )


def _check_topk(args: Namespace, config: TopKConfig, saved: Namespace, directory: Path) -> None:
    for name in ("hidden_size", "num_layers"):
        if getattr(saved, name) != getattr(args, name):
            raise CheckpointError(
                f"{directory} holds a different model: its {name} is {getattr(saved, name)}, but "
                f"this run's is {getattr(args, name)}; change --{name.replace('_', '-')} or --load"
            )
    settings = getattr(saved, "topk", None)
    before = None if settings is None else TopKConfig.from_dict(settings)
    differences = compare_topk(before, config)
    if not differences:
        return
    text = "; ".join(differences)
    if args.finetune or args.topk_override:
        if args.rank == 0:
            print(f"topk_megatron: TopK settings differ from {directory}: {text}", flush=True)
        return
    raise CheckpointError(
        f"{directory} was trained with different TopK settings: {text}; use the same settings, "
        "--topk-override to continue with the new ones, or --finetune to start a new run from its "
        "weights"
    )


def compare_topk(before: TopKConfig | None, now: TopKConfig) -> list[str]:
    """Describe the differences; dense models are equal whatever their unused settings.

    Args:
        before: settings of the checkpoint; None if it was written by a stock Megatron run.
        now: settings of this run.
    """
    was_dense = before is None or not before.layers
    if was_dense or not now.layers:
        if was_dense and not now.layers:
            return []
        described = [_describe(before), _describe(now)]
        return [f"{described[0]} in the checkpoint, {described[1]} here"]
    old, new = before.to_dict(), now.to_dict()  # pyright: ignore[reportOptionalMemberAccess]
    return [
        f"{name} is {old[name]} in the checkpoint, {new[name]} here"
        for name in new
        if old[name] != new[name]
    ]


def _describe(config: TopKConfig | None) -> str:
    if config is None or not config.layers:
        return "dense (no TopK layer)"
    parts = [f"k {config.k} at layers {list(config.layers)}"] if config.residual_layers else []
    if config.mlp_layers:
        parts.append(f"MLP k {config.mlp_k} at layers {list(config.layers)}")
    return ", ".join(parts)
