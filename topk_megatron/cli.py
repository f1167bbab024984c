"""Error handling that every command line shares."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from topk_megatron.errors import USER_ERROR, RunError, TransportError, UserError

_PATIENCE_SECONDS = 10


def exit_on_user_error(main: Callable[[], Any]) -> Callable[[], Any]:
    """Print a user's mistake as one line and exit with 2; for a lost rank, exit with 1.

    Every rank meets most mistakes. Rank 0 reports them while the others wait, so that torchrun does
    not end rank 0 before it has printed. A rank that is still alive after the wait reports an error
    of its own.
    """

    @functools.wraps(main)
    def wrapper() -> Any:
        try:
            return main()
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            if rank != "0" and not isinstance(error, RunError):
                # During training, Megatron's handler would only note torchrun's request to end.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(_PATIENCE_SECONDS)
            where = "" if rank == "0" else f"rank {rank}: "
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR)
        except TransportError as error:
            # Without delay: every other rank that is alive waits for this one.
            print(
                f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True
            )
            sys.exit(1)

    return wrapper
