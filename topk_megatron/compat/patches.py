"""The patches of Megatron itself, for megatron-core 0.19; each with its reason.

`patch_megatron_for_cpu` is for machines without CUDA only, the others for every machine.
"""

import functools
import importlib.util
import logging
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch


def patch_megatron_for_cpu() -> None:
    """Make Megatron's RNG tracker use the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    # Megatron reaches for torch._C and torch.cuda.default_generators here, beyond what
    # topk_megatron.compat.cpu replaces.
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


def patch_checkpoint_save() -> None:
    """Mark a checkpoint that is about to be written over as incomplete.

    A run that went back to an earlier checkpoint saves some iterations a second time. Megatron
    leaves the old ``metadata.json`` in place meanwhile, so that a kill would leave a mixture that
    looks complete (megatron/core/dist_checkpointing/serialization.py).
    """
    from megatron.core import dist_checkpointing

    module: Any = dist_checkpointing
    original = module.save

    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get("RANK", "0") == "0":
            (Path(checkpoint_dir) / "metadata.json").unlink(missing_ok=True)
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    module.save = save


def mend_help(parser: ArgumentParser) -> None:
    """Escape percent signs that Megatron left bare in help texts; they make ``--help`` crash."""
    formatter: Any = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
