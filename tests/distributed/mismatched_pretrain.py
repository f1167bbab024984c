"""Pretraining whose rank 1 starts with a different k, as from a stale launch script.

An entry for `tests.harness.launch.pretrain`.
"""

import os
import sys

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


@exit_on_user_error
def main() -> None:
    """Try to train."""
    device = prepare_device()
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--topk-k") + 1] = "7"
    from topk_megatron.train.main import run

    run(device)


if __name__ == "__main__":
    main()
