"""What every command line shares."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from topk_megatron.errors import UserError


def exit_on_user_error(main: Callable[[], Any]) -> Callable[[], Any]:
    """Print a user's mistake as one line from the first rank, and exit with 2 on every rank."""

    @functools.wraps(main)
    def wrapper() -> Any:
        try:
            return main()
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper
