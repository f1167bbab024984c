"""The patches of Megatron itself, for megatron-core 0.19; each with its reason.

`patch_megatron_for_cpu` is for machines without CUDA only. `patch_dataset_compiler` is for every
pip install.
"""

import importlib.util
import logging
from typing import Any

import torch


def patch_megatron_for_cpu() -> None:
    """Make Megatron's RNG tracker use the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    # Megatron reaches for torch._C and torch.cuda.default_generators here, beyond what
    # topk_megatron.device.cpu replaces.
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(
        new_state
    )
    # With one generator for both devices, the tracker's warning that the CPU state changed inside
    # a fork is always true and never of interest.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def patch_dataset_compiler() -> None:
    """Skip Megatron's `make` of its dataset helpers where the wheel brought them built.

    The wheel lacks the Makefile that `compile_helpers` runs, so that every pip install would exit
    at start-up (megatron/core/datasets/utils.py).
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
