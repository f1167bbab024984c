"""Runs the example's train.py, saves weights and logits, and can stop or sabotage it.

TOPK_LOGITS names a file for the logits of `TOKENS`, taken from DeepSpeed's engine before it writes
the folder. TOPK_WEIGHTS names a folder for the weights after each step. TOPK_STOP_AT is RANK:STEP;
that rank receives SIGTERM during that step. TOPK_LOSE is the fraction of rank 1's gradients to
lose, as a faulty collective might.
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


def keep_weights(engine: Any, path: Path) -> None:
    """Save the full weights by name; every rank calls it."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    split = any(hasattr(parameter, "ds_id") for parameter in named.values())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=split):
        if engine.global_rank == 0:
            torch.save({name: p.detach().clone() for name, p in named.items()}, path)


def lose_gradients(engine: Any, part: float) -> None:
    """Shrink all gradients of this rank before DeepSpeed sees them."""
    for parameter in engine.module.parameters():
        parameter.register_hook(lambda gradient: gradient * (1 - part))


def main() -> None:
    """Train with the hooks in place."""
    sys.path.insert(0, str(EXAMPLE))
    train: Any = importlib.import_module("train")
    write, step, resume = train.write_folder, train.Trainer.step, train.Trainer.resume

    def write_and_keep(engine: Any, *rest: Any) -> None:
        engine.module.eval()
        with torch.no_grad():
            logits = engine.module(TOKENS).logits
        if engine.global_rank == 0:
            torch.save(logits, os.environ["TOPK_LOGITS"])
        write(engine, *rest)

    def resume_sabotaged(self: Any) -> int:
        if self.engine.global_rank == 1 and (part := os.environ.get("TOPK_LOSE")):
            lose_gradients(self.engine, float(part))
        return resume(self)

    def step_or_stop(self: Any, number: int) -> Any:
        rank, at = map(int, os.environ.get("TOPK_STOP_AT", "-1:-1").split(":"))
        if (self.engine.global_rank, number + 1) == (rank, at):
            os.kill(os.getpid(), signal.SIGTERM)
        done = step(self, number)
        if folder := os.environ.get("TOPK_WEIGHTS"):
            keep_weights(self.engine, Path(folder) / f"{number + 1}.pt")
        return done

    train.write_folder = write_and_keep
    train.Trainer.step, train.Trainer.resume = step_or_stop, resume_sabotaged
    train.main()


if __name__ == "__main__":
    main()
