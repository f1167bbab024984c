"""torchrun with an exit code that a scheduler can act on.

    python -m topk_megatron.train.launch --nproc-per-node 8 pretrain_topk_gpt.py …

This is torchrun, with torchrun's own flags, except in three respects:

- After SIGTERM it gives the ranks time to save: ``--shutdown-timeout`` is 600 s unless given.
  torchrun's default of 30 s would cut off a large checkpoint.
- When the ranks stopped on request and saved, it exits with 75. torchrun exits with 1 or 0,
  depending on which process the signal reached first.
- ``--max-restarts`` works, because the ranks get a new store after every restart. torchrun lends
  them its own store, where restarted ranks find the addresses of dead ones
  (pytorch/pytorch#135712).

Ranks cannot report a stop by their exit code: torchrun would take it for a failure and restart
them. Instead, local rank 0 leaves a note in the file that TOPK_STOP_NOTE names.
"""

import os
import sys
import tempfile
from pathlib import Path

from topk_megatron.errors import REQUEUE

NOTE = "TOPK_STOP_NOTE"
GRACE_SECONDS = "600"


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; return its exit code, or 75 if the ranks stopped on request and saved."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="topk-launch-") as directory:
        note = Path(directory) / "stopped"
        os.environ[NOTE] = str(note)
        code = 0
        try:
            run.main(arguments)
        except SignalException as signalled:
            code = 128 + int(signalled.sigval)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
            if not note.exists():
                raise
        if note.exists():
            print(f"topk_megatron: {note.read_text()}; exit code {REQUEUE}", flush=True)
            return REQUEUE
        return code


if __name__ == "__main__":
    sys.exit(main())
