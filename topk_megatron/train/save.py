"""Saving under bad conditions: a full disk ends the run in one line, a signal waits its turn.

Schedulers signal every process of a job and not the ranks alone. SIGTERM is therefore blocked while
a checkpoint is written: the rank gets it afterwards, and the helper processes that write, which
inherit the mask, never. Without that a second SIGTERM broke the very save that the first one asked
for.
"""

import functools
import os
import shutil
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from topk_megatron.checkpoint.directory import is_complete, iterations
from topk_megatron.errors import RunError

_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_WRITER = ("unexpected pos", "Worker failure", "PytorchStreamWriter")
_FULL_BYTES = 64 * 1024**2  # less than a writer's buffers


def guard_saves() -> None:
    """Block SIGTERM during saves, and turn what the disk refuses into a `RunError`.

    Megatron's writer raises in the rank whose file it was, and the others learn of it through a
    collective, or not at all.
    """
    from megatron.training import checkpointing, training
    from torch.distributed.checkpoint.api import CheckpointException

    original = training.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        # Starting it later would unblock SIGTERM again (multiprocessing/resource_tracker.py).
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return original(iteration, *args, **kwargs)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            settings: Any = training.get_args()
            save = Path(settings.save)
            if (reason := _refused(error, save)) is None:
                raise
            raise RunError(_sentence(reason, save, iteration)) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    for module in (training, checkpointing):
        vars(module)["save_checkpoint"] = save_checkpoint


def _refused(error: BaseException, save: Path) -> str | None:
    """Why the file system took no more; None if the error is of another kind."""
    text = str(error)
    for phrase in _FULL:
        if phrase in text:
            return phrase[0].lower() + phrase[1:]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    # torch's zip writer reports a short write as a wrong position, and Megatron's worker passes
    # on the type of what it met only: what is left on the disk decides.
    if any(word in text for word in _WRITER):
        return _full_disk(save)
    cause = error.__cause__ or error.__context__
    return None if cause is None else _refused(cause, save)


def _full_disk(save: Path) -> str | None:
    usage = shutil.disk_usage(save)
    if usage.free > max(_FULL_BYTES, usage.total // 100):
        return None
    return f"no space left on device ({usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free)"


def _sentence(reason: str, save: Path, iteration: int) -> str:
    whole = [number for number, path in iterations(save).items() if is_complete(path)]
    left = f"iteration {max(whole)} is the last that is" if whole else "none is"
    rank = os.environ.get("RANK", "0")
    return (
        f"the checkpoint of iteration {iteration} could not be written by rank {rank} to {save}: "
        f"{reason}. It is incomplete and will not be loaded; {left} complete. Make room and start "
        "the same command again"
    )
