"""A folder that appears under its name only when it is whole."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topk_megatron.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary sibling of `target` to write into; rename it at the end.

    Whatever ends the block early removes what was written; only a kill leaves the sibling (a name
    that begins with a dot), which the next run for `target` on this machine removes.

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
    """Never write over something."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already; give another --save or remove it")


def _remove_leftovers(target: Path) -> None:
    """Of killed runs on this machine; their process numbers are in the names."""
    prefix = f".{target.name}.partial.{socket.gethostname()}."
    for path in target.parent.glob(f"{prefix}*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(path, ignore_errors=True)
