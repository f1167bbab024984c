"""What happens when a run is asked to stop: it saves, and ends with a code that asks for more.

Megatron's own signal handler (``--exit-signal-handler``, on by default here) finishes the step,
saves and exits with 0, which no scheduler takes for an unfinished job.
"""

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topk_megatron.errors import REQUEUE
from topk_megatron.train.wrapping import argument_reader

_NOTE = "TOPK_STOP_NOTE"  # as in topk_megatron.train.launch


class StopWatch:
    """Remembers whether Megatron left its loop because of the signal.

    Attributes:
        iteration: last finished one when the run left on request; None while it goes on.
    """

    def __init__(self) -> None:
        self.iteration: int | None = None

    def install(self) -> None:
        """Look at Megatron's decision to exit (megatron-core 0.19 returns it from one place)."""
        from megatron.training import training
        from megatron.training.global_vars import get_signal_handler

        module: Any = training
        original = module.checkpoint_and_decide_exit
        iteration_of = argument_reader(original, "iteration")

        @functools.wraps(original)
        def decide(*args: Any, **kwargs: Any) -> bool:
            leaving = original(*args, **kwargs)
            settings: Any = training.get_args()
            # All ranks leave together, so that all of them reach this collective.
            if leaving and settings.exit_signal_handler:
                handler: Any = get_signal_handler()
                if any(handler.signals_received()):
                    self.iteration = iteration_of(args, kwargs)
            return leaving

        module.checkpoint_and_decide_exit = decide

    def run(self, args: Namespace, train: Callable[[], None]) -> None:
        """Call `train`; when it leaves on request, say so in the way that the launcher reads."""
        try:
            train()
        except SystemExit:
            if self.iteration is None or args.save is None:
                raise
            self._report(args)
            raise

    def _report(self, args: Namespace) -> None:
        said = f"stopped by a signal after iteration {self.iteration}, saved in {args.save}"
        if (note := os.environ.get(_NOTE)) is not None:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                Path(note).write_text(said)
        elif "TORCHELASTIC_RUN_ID" not in os.environ:  # plain torchrun would restart the ranks
            if args.rank == 0:
                print(f"topk_megatron: {said}; exit code {REQUEUE}", flush=True)
            sys.exit(REQUEUE)
