"""Interruptions of a run: a full disk ends it with one line, and a signal waits for the save.

Schedulers signal every process of a job, not only the ranks. SIGTERM is therefore blocked while a
checkpoint is written: the rank receives it afterwards, and the helper processes that write, which
inherit the mask, never do. Otherwise a second SIGTERM would break the very save that the first one
requested.

Megatron's own signal handler (``--exit-signal-handler``, on by default here) finishes the step,
saves and exits with 0, which looks like a finished job to a scheduler. Here a run that stops on
request exits with a code that asks to be requeued.
"""

import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from topk_megatron.checkpoint.directory import is_complete, iterations
from topk_megatron.errors import REQUEUE, RunError
from topk_megatron.train.launch import NOTE

_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_WRITER = ("unexpected pos", "Worker failure", "PytorchStreamWriter")
_FULL_BYTES = 64 * 1024**2  # less than a writer's buffers


def guarded_save(save_checkpoint: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
    """Save with SIGTERM blocked, and turn an error of the disk into a `RunError`.

    Megatron's writer raises on the rank whose file failed. The other ranks learn of it through a
    collective, or not at all.

    Raises:
        RunError: if the file system refused the checkpoint.
    """
    from megatron.training import get_args
    from torch.distributed.checkpoint.api import CheckpointException

    # Starting the tracker later would unblock SIGTERM again (multiprocessing/resource_tracker.py).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if not kwargs.get("non_persistent_ckpt"):  # these lie in a folder of their own
        _mark_incomplete(iteration)
    try:
        return save_checkpoint(iteration, *args, **kwargs)
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        settings: Any = get_args()
        save = Path(settings.save)
        if (reason := _refused(error, save)) is None:
            raise
        raise RunError(_sentence(reason, save, iteration)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _mark_incomplete(iteration: int) -> None:
    """Remove the index of a Megatron-FSDP checkpoint that is about to be overwritten.

    torch writes the index last, so that without it a checkpoint counts as incomplete. It would
    leave the old one meanwhile (`patches.mark_saves_incomplete` does this for torch_dist).
    """
    from megatron.training import get_args

    args: Any = get_args()
    if args.ckpt_format == "fsdp_dtensor" and args.rank == 0:
        (Path(args.save) / f"iter_{iteration:07d}" / ".metadata").unlink(missing_ok=True)


def _refused(error: BaseException, save: Path) -> str | None:
    """Say why the file system refused the checkpoint; return None for any other error."""
    text = str(error)
    for phrase in _FULL:
        if phrase in text:
            return phrase[0].lower() + phrase[1:]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    # torch's zip writer reports a short write as a wrong position, and Megatron's worker passes on
    # only the type of its error. In these cases the free space on the disk decides.
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
    left = f"the last complete one is iteration {max(whole)}" if whole else "no other is complete"
    rank = os.environ.get("RANK", "0")
    return (
        f"rank {rank} could not write the checkpoint of iteration {iteration} to {save}: {reason}. "
        f"This checkpoint is incomplete and will not be loaded; {left}. Free some space and run "
        "the same command again"
    )


class StopWatch:
    """Remembers whether Megatron left its loop because of a signal.

    Attributes:
        iteration: last finished iteration of a run that stopped on request; None otherwise.
    """

    def __init__(self) -> None:
        self.iteration: int | None = None

    def on_exit(self, iteration: int) -> None:
        """Remember the iteration if a signal is why Megatron leaves its loop."""
        from megatron.training import get_args
        from megatron.training.global_vars import get_signal_handler

        settings: Any = get_args()
        handler: Any = get_signal_handler()
        # All ranks leave together, so all of them reach this collective.
        if settings.exit_signal_handler and any(handler.signals_received()):
            self.iteration = iteration

    def run(self, args: Namespace, train: Callable[[], None]) -> None:
        """Call `train`; if it stops on request, report that where the launcher reads it."""
        try:
            train()
        except SystemExit:
            if self.iteration is None or args.save is None:
                raise
            self._report(args)
            raise

    def _report(self, args: Namespace) -> None:
        said = f"stopped by a signal after iteration {self.iteration}, saved in {args.save}"
        if (note := os.environ.get(NOTE)) is not None:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                Path(note).write_text(said)
        elif "TORCHELASTIC_RUN_ID" not in os.environ:  # plain torchrun would restart the ranks
            if args.rank == 0:
                print(f"topk_megatron: {said}; exit code {REQUEUE}", flush=True)
            sys.exit(REQUEUE)
