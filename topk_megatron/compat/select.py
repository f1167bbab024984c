"""Chooses the device layer once, before Megatron is imported.

Megatron reads ``torch.cuda`` while its modules are imported (for example for the tuples of tensor
types in ``megatron/core/transformer/module.py``), so the choice cannot wait for the arguments.
"""

import os
import sys
import warnings
from argparse import Namespace

import torch

from topk_megatron.compat.accelerators import check_apex, find_no_compiler, hide_accelerators
from topk_megatron.compat.connections import NO_GPU, compute_capability, peek, set_connections

_prepared: str | None = None


def prepare_device() -> str:
    """Switch the CPU layer on if this machine has no CUDA device; safe to call more than once.

    Every call also sets CUDA_DEVICE_MAX_CONNECTIONS for the flags on the command line, on a GPU
    before anything starts CUDA.

    Returns:
        ``"cuda"`` or ``"cpu"``.

    Raises:
        ConfigError: if a package other than NVIDIA's is installed under the name `apex`.
    """
    global _prepared
    flags = peek(sys.argv[1:])
    if _prepared is None:
        check_apex()
        set_connections(flags, compute_capability())
        _prepared = "cuda" if torch.cuda.is_available() else "cpu"
        if _prepared == "cpu":
            _set_environment()
            hide_accelerators()
            from topk_megatron.compat.cpu import redirect_cuda_to_cpu

            redirect_cuda_to_cpu()
        elif find_no_compiler() is not None:
            # Megatron decorates functions with torch.compile whatever its flags say, and each
            # would fail in its first call.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    fit_connections(flags)
    return _prepared


def fit_connections(args: Namespace) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS for Megatron's arguments, on the device chosen before."""
    set_connections(args, NO_GPU if _prepared == "cpu" else compute_capability())


def _set_environment() -> None:
    # Megatron decorates small functions with torch.compile. Without a GPU that costs a compiler
    # run in every process and gains nothing. torch._dynamo reads this when it is first imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # A dozen modules of Megatron warn of this on every rank; without a GPU it is expected.
    warnings.filterwarnings(
        "ignore", message="(Transformer Engine and )?Apex (is|are) not installed"
    )
    warnings.filterwarnings("ignore", message="Only transformer-engine>=")
