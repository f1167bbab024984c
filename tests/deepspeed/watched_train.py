"""The example's train.py, which also keeps the trained model's logits, and can be stopped.

TOPK_LOGITS names a file for the logits of `TOKENS`, taken from DeepSpeed's engine before it writes
the folder. TOPK_STOP_AT is RANK:STEP; that rank gets SIGTERM during that step.
"""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "deepspeed"
TOKENS = torch.arange(3, 43).reshape(2, 20)


def main() -> None:
    """Train."""
    sys.path.insert(0, str(EXAMPLE))
    train: Any = importlib.import_module("train")
    write, step = train.write_folder, train.Trainer.step

    def write_and_keep(engine: Any, *rest: Any) -> None:
        engine.module.eval()
        with torch.no_grad():
            logits = engine.module(TOKENS).logits
        if engine.global_rank == 0:
            torch.save(logits, os.environ["TOPK_LOGITS"])
        write(engine, *rest)

    def step_or_stop(self: Any, number: int) -> Any:
        rank, at = map(int, os.environ.get("TOPK_STOP_AT", "-1:-1").split(":"))
        if (self.engine.global_rank, number + 1) == (rank, at):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    train.write_folder, train.Trainer.step = write_and_keep, step_or_stop
    train.main()


if __name__ == "__main__":
    main()
