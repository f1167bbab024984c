"""Pretraining in which rank 1 is killed with -9 just before it sends its n-th gradient.

An entry for real ranks; TOPK_KILL_MESSAGE is n.
"""

import os
import signal
from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


@exit_on_user_error
def main() -> None:
    """Train until the fatal message."""
    device = prepare_device()
    from topk_megatron.parallel import pipeline
    from topk_megatron.train.main import run

    if os.environ["RANK"] == "1":
        doomed = int(os.environ["TOPK_KILL_MESSAGE"])
        original = pipeline.pack_gradient
        sent = 0

        def pack_gradient(*args: Any) -> Any:
            nonlocal sent
            sent += 1
            if sent == doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        pipeline.pack_gradient = pack_gradient
    run(device)


if __name__ == "__main__":
    main()
