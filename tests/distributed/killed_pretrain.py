"""Pretraining whose ranks and launcher are all killed with -9 at a chosen point of a save.

An entry for `tests.harness.launch.pretrain`. TOPK_KILL_AT names the point, and TOPK_KILL_SAVE the
iteration whose save is hit.
"""

import os
from pathlib import Path
from typing import Any

from tests.harness.launch import kill_job
from topk_megatron.compat import prepare_device


def main() -> None:
    """Train until the save of the chosen iteration reaches the chosen point."""
    device = prepare_device()
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing

    point, iteration = os.environ["TOPK_KILL_AT"], int(os.environ["TOPK_KILL_SAVE"])
    doomed = f"iter_{iteration:07d}"
    if point == "before-data":
        _kill_in(FileSystemWriterAsync, "prepare_write_data", doomed)
    elif point == "before-index":
        _kill_in(FileSystemWriterAsync, "finish", doomed)
    elif point == "before-metadata":
        _kill_in(serialization, "save_config", doomed)
    else:
        _kill_after_truncating_tracker(checkpointing, doomed)
    from topk_megatron.train.main import run

    run(device)


def _kill_in(owner: Any, name: str, doomed: str) -> None:
    """Kill the job instead of calling `owner.name` on the doomed checkpoint."""
    original = getattr(owner, name)

    def hit(*args: Any, **kwargs: Any) -> Any:
        about = [getattr(args[0], "path", ""), *args, *kwargs.values()]
        if any(doomed in str(argument) for argument in about):
            kill_job(os.getppid())
        return original(*args, **kwargs)

    setattr(owner, name, hit)


def _kill_after_truncating_tracker(checkpointing: Any, doomed: str) -> None:
    storage = checkpointing.maybe_msc
    original = storage.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(path, mode, *args, **kwargs)
        is_tracker = Path(path).name == "latest_checkpointed_iteration.txt" and "w" in mode
        if is_tracker and (Path(path).parent / doomed).is_dir():
            kill_job(os.getppid())
        return file

    storage.open = opened


if __name__ == "__main__":
    main()
