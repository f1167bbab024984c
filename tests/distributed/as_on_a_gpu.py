"""Pretrains with the defaults of a GPU machine that has neither Transformer Engine nor Apex.

An entry for `tests.harness.launch.pretrain` that runs on a CPU: what is decided for a GPU is
decided here, and only the device underneath differs. A kernel that is not installed ends the run.
"""

import sys

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


@exit_on_user_error
def main() -> None:
    """Train with the arguments for CUDA, but for those that choose the device."""
    assert prepare_device() == "cpu"
    from topk_megatron.train.main import run

    sys.argv += ["--distributed-backend", "gloo", "--use-cpu-initialization"]
    run("cuda")


if __name__ == "__main__":
    main()
