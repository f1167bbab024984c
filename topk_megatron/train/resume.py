"""Which checkpoint a run continues from, and whether it may.

Megatron's torch_dist checkpoint is complete when ``.metadata`` and ``metadata.json`` are there: the
last is written after every rank has finished. The tracker file
``latest_checkpointed_iteration.txt`` is rewritten in place, so that a kill can leave it empty.
"""

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from topk_megatron.config import TopKConfig, anneal_end_of, parse_layers
from topk_megatron.errors import CheckpointError
from topk_megatron.train.damage import find_damage

TRACKER = "latest_checkpointed_iteration.txt"
_PARTS = (".metadata", "metadata.json")


def prepare_resume(args: Namespace, config: TopKConfig) -> None:
    """Point the tracker at a complete checkpoint and compare its settings with this run's.

    Raises:
        CheckpointError: other TopK settings or another vocabulary, unless overridden.
    """
    if args.load is None:
        return
    first = args.rank == 0
    hashes = first and args.verify_integrity  # reads every byte: once, not once a rank
    directory = find_checkpoint(Path(args.load), args.ckpt_step, write=first, hashes=hashes)
    if directory is None:
        _check_needed(args)
        return
    saved = read_checkpoint_args(directory)
    if saved is None:
        return
    _check_vocabulary(args, saved, directory)
    _check_topk(args, config, saved, directory)


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


def choose_settings(args: Namespace) -> TopKConfig:
    """This run's TopK settings: its flags, and under ``--use-checkpoint-args`` the checkpoint's.

    Each ``--topk-…`` flag on the command line wins over the checkpoint's value. Where no end of
    annealing is given, a resumed run keeps the one that it was begun with, also when it is made
    longer.
    """
    if args.use_checkpoint_args and (before := _saved_settings(args)) is not None:
        return _merged(args, before)
    config = TopKConfig.from_args(args)
    if config.anneal == "constant" or args.topk_anneal_end is not None or args.finetune:
        return config
    before = _saved_settings(args)
    if (
        before is not None
        and {**before.to_dict(), "anneal_end": config.anneal_end} == config.to_dict()
    ):
        return before
    return config


def _saved_settings(args: Namespace) -> TopKConfig | None:
    """The TopK settings of the checkpoint that ``--load`` names, if there is one that has them."""
    if args.load is None:
        return None
    directory = find_checkpoint(Path(args.load), args.ckpt_step)
    saved = None if directory is None else read_checkpoint_args(directory)
    settings = getattr(saved, "topk", None)
    return None if settings is None else TopKConfig.from_dict(settings)


def _merged(args: Namespace, saved: TopKConfig) -> TopKConfig:
    """The checkpoint's settings with those changed that the command line gives."""
    given = {name: getattr(args, f"topk_{name}") for name in _FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"], args.num_layers)
    before = saved.to_dict()
    if given.get("anneal") == "constant":
        before.update(anneal_start_k=None, anneal_begin=0, anneal_end=0)
    elif "anneal" in given and saved.anneal == "constant":
        given["anneal_end"] = anneal_end_of(args)
    if given.get("site") == "residual":
        before.update(mlp_k=None, mlp_groups=None)
    return TopKConfig.from_dict({**before, **given})


def find_checkpoint(
    load: Path, step: int | None = None, *, write: bool = False, hashes: bool = False
) -> Path | None:
    """The torch_dist checkpoint that Megatron will load from `load`, or None.

    Args:
        load: directory given as ``--load``.
        step: iteration asked for by ``--ckpt-step``; None is the latest.
        write: repair the tracker when it names no complete checkpoint. One rank does it; all ranks
            come to the same answer whether or not it is done already.
        hashes: also compare the bytes of the latest checkpoint with their recorded hashes.

    Raises:
        CheckpointError: `step` names a checkpoint that is missing, incomplete or damaged, or no
            checkpoint of `load` is whole although it has some.
    """
    complete = {number: path for number, path in iterations(load).items() if is_complete(path)}
    if step is not None:
        if step not in complete:
            raise CheckpointError(
                f"no complete checkpoint of iteration {step} in {load}; it has {_listing(complete)}"
            )
        if damage := find_damage(complete[step], hashes=hashes):
            raise CheckpointError(
                f"the checkpoint of iteration {step} in {load} is damaged: {damage}; give another "
                f"--ckpt-step of {_listing(complete)}"
            )
        return complete[step]
    tracked = _read_tracker(load)
    if tracked == "release" or not iterations(load) or _has_legacy_format(load, tracked):
        return None
    if not complete:
        if tracked is None:
            return None  # killed during its very first save: there is nothing to resume from
        raise CheckpointError(
            f"{load} has no complete checkpoint (the tracker names iteration {tracked}); give "
            "another --load, or none to start anew"
        )
    return _latest_whole(load, complete, tracked, write=write, hashes=hashes)


def _latest_whole(
    load: Path, complete: dict[int, Path], tracked: Any, *, write: bool, hashes: bool
) -> Path:
    """The tracked checkpoint, or the latest before it that is not damaged; says why not."""
    reason = "names nothing" if tracked is None else f"names iteration {tracked}, which is "
    if tracked in complete:
        candidates = [number for number in complete if number <= tracked]
    else:
        candidates = list(complete)
        reason += "" if tracked is None else "incomplete"
    for number in sorted(candidates, reverse=True):
        damage = find_damage(complete[number], hashes=hashes)
        if damage is not None:
            if number == tracked:
                reason += f"damaged ({damage})"
            else:
                reason += f"; iteration {number} is damaged ({damage})"
            continue
        if write and number != tracked:
            print(f"topk_megatron: {load / TRACKER} {reason}; resuming from {number}", flush=True)
            _write_tracker(load, number)
        return complete[number]
    raise CheckpointError(
        f"no checkpoint in {load} can be loaded: {load / TRACKER} {reason}; give another --load, "
        "or none to start anew"
    )


def iterations(load: Path) -> dict[int, Path]:
    """Checkpoint directories of `load` by iteration, complete or not."""
    found = {}
    for path in load.glob("iter_*"):
        if (match := re.fullmatch(r"iter_(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return found


def is_complete(directory: Path) -> bool:
    """Whether every rank finished writing this torch_dist checkpoint."""
    return all((directory / part).is_file() for part in _PARTS)


def read_checkpoint_args(directory: Path) -> Namespace | None:
    """The arguments of the run that wrote a torch_dist checkpoint; None if it has none."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    return load_common_state_dict(str(directory)).get("args")


def _listing(complete: dict[int, Path]) -> str:
    return ", ".join(str(number) for number in sorted(complete)) or "none"


def _read_tracker(load: Path) -> int | str | None:
    try:
        text = (load / TRACKER).read_text().strip()
    except OSError:
        return None
    if text == "release":
        return text
    return int(text) if text.isdecimal() else None


def _write_tracker(load: Path, iteration: int) -> None:
    temporary = load / f"{TRACKER}.{os.getpid()}"
    temporary.write_text(str(iteration))
    temporary.replace(load / TRACKER)


def _has_legacy_format(load: Path, tracked: Any) -> bool:
    directory = iterations(load).get(tracked) if isinstance(tracked, int) else None
    return directory is not None and any(directory.glob("mp_rank_*"))


def _check_needed(args: Namespace) -> None:
    """A run that only makes sense with a checkpoint must not go on with random weights."""
    if _read_tracker(Path(args.load)) == "release":
        return
    for flag in ("finetune", "skip_train", "use_checkpoint_args"):
        if getattr(args, flag):
            raise CheckpointError(
                f"--{flag.replace('_', '-')} needs a checkpoint, and {args.load} holds none that "
                "is complete; check --load"
            )


def _check_vocabulary(args: Namespace, saved: Namespace, directory: Path) -> None:
    before = getattr(saved, "tokenizer_vocab_size", None)
    now = args.tokenizer_vocab_size
    if before is not None and before != now:
        raise CheckpointError(
            f"the tokenizer does not fit the checkpoint: {directory} was trained with {before} "
            f"pieces ({saved.tokenizer_model}), {args.tokenizer_model} has {now}; give the "
            "tokenizer that the checkpoint was trained with"
        )


def _check_topk(args: Namespace, config: TopKConfig, saved: Namespace, directory: Path) -> None:
    for name in ("hidden_size", "num_layers"):
        if getattr(saved, name) != getattr(args, name):
            raise CheckpointError(
                f"{directory} is of another model: its {name} is {getattr(saved, name)}, this "
                f"run's is {getattr(args, name)}"
            )
    settings = getattr(saved, "topk", None)
    before = None if settings is None else TopKConfig.from_dict(settings)
    differences = compare_topk(before, config)
    if not differences:
        return
    text = "; ".join(differences)
    if args.finetune or args.topk_override:
        if args.rank == 0:
            print(f"topk_megatron: TopK settings change from {directory}: {text}", flush=True)
        return
    raise CheckpointError(
        f"{directory} was trained with other TopK settings: {text}; use the same, or "
        "--topk-override to continue with the new ones, or --finetune for a new run from its "
        "weights"
    )


def compare_topk(before: TopKConfig | None, now: TopKConfig) -> list[str]:
    """Differences in words; dense models are equal whatever their unused settings.

    Args:
        before: settings of the checkpoint; None if a dense Megatron run without them wrote it.
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
