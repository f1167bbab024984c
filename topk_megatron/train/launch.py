"""torchrun whose exit code a scheduler can act on.

    python -m topk_megatron.train.launch --nproc-per-node 8 pretrain_topk_gpt.py …

takes torchrun's own flags and is torchrun, but for three things. After SIGTERM it gives the ranks
time to save (`--shutdown-timeout`, here 600 s unless given; torchrun's default of 30 s ends a large
checkpoint half way), and when they stopped because they were asked to and have saved, it exits with
75, where torchrun exits with 1 or with 0 depending on whom the signal reached first.

And ``--max-restarts`` works: torchrun lends its own store to the ranks, where the restarted ones
find the addresses of the dead (pytorch/pytorch#135712); here every life of a job has a new store.

Ranks cannot tell of a stop by their own exit code: torchrun would take it for a failure and restart
them. Local rank 0 leaves a note instead, in a file named by TOPK_STOP_NOTE.
"""

import os
import sys
import tempfile
from pathlib import Path

from topk_megatron.errors import REQUEUE

NOTE = "TOPK_STOP_NOTE"
GRACE_SECONDS = "600"


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns its exit code, or 75 when the ranks stopped on request and saved."""
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
