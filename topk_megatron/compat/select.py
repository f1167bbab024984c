"""Chooses the device layer once, before Megatron is imported.

Megatron reads ``torch.cuda`` while its modules are imported (for example the tuples of tensor types
in ``megatron/core/transformer/module.py``), so the choice cannot wait for the arguments.
"""

import os
import warnings

import torch

from topk_megatron.compat.accelerators import check_apex, hide_accelerators

_prepared: str | None = None


def prepare_device() -> str:
    """Switch the CPU layer on when this machine has no CUDA device; do nothing otherwise.

    Returns:
        ``"cuda"`` or ``"cpu"``. Safe to call more than once.

    Raises:
        ConfigError: another package than NVIDIA's is installed under the name `apex`.
    """
    global _prepared
    if _prepared is None:
        check_apex()
        _prepared = "cuda" if torch.cuda.is_available() else "cpu"
        if _prepared == "cpu":
            _set_environment()
            hide_accelerators()
            from topk_megatron.compat.cpu import redirect_cuda_to_cpu

            redirect_cuda_to_cpu()
    return _prepared


def _set_environment() -> None:
    # Megatron decorates small functions with torch.compile; without a GPU that costs a compiler
    # run in every process and gains nothing. Read when torch._dynamo is first imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron asserts this for tensor parallelism, for the order of CUDA launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Said by a dozen modules of Megatron, each in every rank; expected where there is no GPU.
    warnings.filterwarnings(
        "ignore", message="(Transformer Engine and )?Apex (is|are) not installed"
    )
    warnings.filterwarnings("ignore", message="Only transformer-engine>=")
