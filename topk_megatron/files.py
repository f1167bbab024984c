"""Files and folders: written in one step, read with clear errors, identified by their hash."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError, UserError

_PARTIAL = ".partial-"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` to write into, and rename it at the end.

    If the block ends early, everything written is removed. Only a kill leaves the sibling, whose
    name begins with a dot; the next run for `target` on this machine removes it.

    Raises:
        CheckpointError: `target` exists, or the disk is full or cannot be written to.
    """
    refuse_existing(target)
    temporary = target.with_name(f".{target.name}.partial.{socket.gethostname()}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary.mkdir()
        yield temporary
        refuse_existing(target)
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
        CheckpointError: `target` exists.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; give another --save or remove it")


def _remove_leftovers(target: Path) -> None:
    """Remove the folders of killed runs on this machine; their names hold the process number."""
    prefix = f".{target.name}.partial.{socket.gethostname()}."
    for path in target.parent.glob(f"{prefix}*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` in one step if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(directory: Path) -> None:
    """Delete the unfinished files that killed processes left below `directory`.

    No other process may be writing there.
    """
    for path in directory.rglob(f".*{_PARTIAL}*"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path, error: type[UserError] = CheckpointError) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        error: the class of the error to raise.

    Raises:
        UserError: of class `error`, if the file is missing, unreadable or not JSON.
    """
    if not path.is_file():
        raise error(f"{path.parent} has no {path.name}")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON: {problem}") from problem


def read_object(path: Path, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: as `read_json` does, or if the file does not hold an object.
    """
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(
    path: Path, content: Any, *, sort_keys: bool = False, allow_nan: bool = False
) -> None:
    """Write a JSON file in one step; it survives a power cut.

    Args:
        path: the file.
        content: anything that `json` can write.
        sort_keys: whether to sort the keys of objects.
        allow_nan: whether to write NaN and infinities, which are not JSON, as Python does.

    Raises:
        ValueError: `content` holds NaN or an infinity without `allow_nan`.
    """
    options: dict[str, Any] = {"indent": 2, "sort_keys": sort_keys, "allow_nan": allow_nan}
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(content, **options) + "\n")
        file.flush()
        os.fsync(file.fileno())


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file, as manifests record them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read_scalars(directory: Path, tag: str) -> dict[int, float]:
    """Return values by iteration from the TensorBoard events of `directory`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
