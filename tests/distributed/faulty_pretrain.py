"""Pretraining in which one rank meets a fault before a chosen step.

An entry for `tests.harness.launch.pretrain`. TOPK_FAULT is RANK:ITERATION:WHAT, where WHAT is
``kill`` (kill -9 ends the rank, but only before the job's first restart), ``nan`` (its loss is NaN)
or ``signal`` (it alone gets SIGTERM). TOPK_FAULT_STEP_SECONDS slows every step down.
"""

import math
import os
import signal
import time
from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


@exit_on_user_error
def main() -> None:
    """Train until the fault."""
    device = prepare_device()
    from topk_megatron.train import main as training
    from topk_megatron.train import step

    rank, iteration, what = os.environ.get("TOPK_FAULT", "-1:0:none").split(":")
    pause = float(os.environ.get("TOPK_FAULT_STEP_SECONDS", "0"))
    original = step.forward_step

    def forward(data_iterator: Any, model: Any, *rest: Any) -> tuple[Any, Any]:
        time.sleep(pause)
        args: Any = step.get_args()
        output, reduction = original(data_iterator, model, *rest)
        now = args.rank == int(rank) and args.curr_iteration + 1 == int(iteration)
        if now and what == "nan":
            output = output * math.nan
        if now and what == "kill" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if now and what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return output, reduction

    step.forward_step = forward
    training.run(device)


if __name__ == "__main__":
    main()
