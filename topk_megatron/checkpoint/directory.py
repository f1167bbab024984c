"""Finds the checkpoint of a directory that can be loaded, and the damage of those that cannot.

Megatron's torch_dist checkpoint is complete when it has ``.metadata`` and ``metadata.json``, which
is written after every rank has finished. A checkpoint of Megatron-FSDP has no ``metadata.json``:
torch writes its ``.metadata`` last. The tracker file ``latest_checkpointed_iteration.txt`` is
rewritten in place, so that a kill can leave it empty.

There are two searches for damage. The quick one compares file sizes with the checkpoint's index,
which says in which bytes of which file each tensor is. Changed bits inside a file are found only by
its hash, which ``--verify-integrity`` writes on saving and reads on loading.
"""

import re
from pathlib import Path
from typing import Any

from topk_megatron.checkpoint.reader import CheckpointReader, is_fsdp_index
from topk_megatron.errors import CheckpointError, DamagedCheckpointError
from topk_megatron.files import replacing

TRACKER = "latest_checkpointed_iteration.txt"
_PARTS = (".metadata", "metadata.json")


def open_checkpoint(
    load: Path,
    step: int | None = None,
    *,
    write: bool = False,
    hashes: bool = False,
    fsdp: bool = False,
) -> CheckpointReader | None:
    """Open the checkpoint that Megatron will load from `load`; None if there is none.

    Args:
        load: the directory given as ``--load``.
        step: the iteration given as ``--ckpt-step``; None is the latest.
        write: whether to repair a tracker that names no complete checkpoint. One rank does it; all
            ranks find the same checkpoint before and after the repair.
        hashes: whether to compare the bytes of the latest checkpoint with their recorded hashes.
        fsdp: whether the caller can use a checkpoint of Megatron-FSDP.

    Raises:
        CheckpointError: checkpoint `step` is missing, incomplete or damaged, or `load` has
            checkpoints and none of them is intact, or the caller cannot use its format.
    """
    reader = _open_whole(load, step, write=write, hashes=hashes)
    if reader is not None and not fsdp:
        refuse_fsdp(reader)
    return reader


def refuse_fsdp(reader: CheckpointReader) -> None:
    """Refuse a checkpoint of Megatron-FSDP.

    Raises:
        CheckpointError: says which runs can use it, and how to get one that everything can use.
    """
    if reader.is_fsdp:
        raise CheckpointError(
            f"{reader.directory} was written by Megatron-FSDP (--ckpt-format fsdp_dtensor), and "
            "only a run with --use-megatron-fsdp --ckpt-format fsdp_dtensor can continue from it; "
            "to convert or sample a model, train it without --use-megatron-fsdp (for example with "
            "--use-distributed-optimizer), which saves in torch_dist"
        )


def _open_whole(
    load: Path, step: int | None, *, write: bool, hashes: bool
) -> CheckpointReader | None:
    complete = {number: path for number, path in iterations(load).items() if is_complete(path)}
    if step is not None:
        if step not in complete:
            raise CheckpointError(
                f"no complete checkpoint of iteration {step} in {load}; it has {_listing(complete)}"
            )
        try:
            return CheckpointReader(complete[step], hashes=hashes)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"the checkpoint of iteration {step} in {load} is damaged: {error.damage}; give "
                f"another iteration of {_listing(complete)}"
            ) from error
    tracked = _read_tracker(load)
    if tracked == "release" or not iterations(load) or _has_legacy_format(load, tracked):
        return None
    if not complete:
        if tracked is None:
            return None  # killed during its very first save: there is nothing to resume from
        raise CheckpointError(
            f"{load} has no complete checkpoint (the tracker names iteration {tracked}); give "
            "another --load, or none to start from scratch"
        )
    return _latest_whole(load, complete, tracked, write=write, hashes=hashes)


def _latest_whole(
    load: Path, complete: dict[int, Path], tracked: Any, *, write: bool, hashes: bool
) -> CheckpointReader:
    """Open the tracked checkpoint, or the latest undamaged one before it."""
    reason = "names nothing" if tracked is None else f"names iteration {tracked}, which is "
    if tracked in complete:
        candidates = [number for number in complete if number <= tracked]
    else:
        candidates = list(complete)
        reason += "" if tracked is None else "incomplete"
    for number in sorted(candidates, reverse=True):
        try:
            reader = CheckpointReader(complete[number], hashes=hashes)
        except DamagedCheckpointError as error:
            which = "" if number == tracked else f"; iteration {number} is "
            reason += f"{which}damaged ({error.damage})"
            continue
        if write and number != tracked:
            print(f"topk_megatron: {load / TRACKER} {reason}; resuming from {number}", flush=True)
            _write_tracker(load, number)
        return reader
    raise CheckpointError(
        f"no checkpoint in {load} can be loaded: {load / TRACKER} {reason}; give another --load, "
        "or none to start from scratch"
    )


def iterations(load: Path) -> dict[int, Path]:
    """Return the checkpoint directories of `load` by iteration, complete or not."""
    found = {}
    for path in load.glob("iter_*"):
        if (match := re.fullmatch(r"iter_(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return found


def is_complete(directory: Path) -> bool:
    """Whether every rank finished writing this checkpoint."""
    if all((directory / part).is_file() for part in _PARTS):
        return True
    # Megatron-FSDP's, or a torch_dist checkpoint whose writing was interrupted.
    return (directory / _PARTS[0]).is_file() and is_fsdp_index(directory)


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


def names_release(load: Path) -> bool:
    """Whether the tracker names a release, which is a checkpoint without an iteration."""
    return _read_tracker(load) == "release"


def _write_tracker(load: Path, iteration: int) -> None:
    with replacing(load / TRACKER) as temporary:
        temporary.write_text(str(iteration))


def _has_legacy_format(load: Path, tracked: Any) -> bool:
    directory = iterations(load).get(tracked) if isinstance(tracked, int) else None
    return directory is not None and any(directory.glob("mp_rank_*"))
