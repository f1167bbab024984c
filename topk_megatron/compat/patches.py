"""Every change to megatron-core 0.19, each with its reason.

Nothing outside compat/ assigns to a module or class of Megatron or torch
(tests/test_architecture.py checks this). `topk_megatron.compat.cpu` has the changes to torch for
machines without CUDA. To move to a new version of Megatron, check each function here: it names the
function that it replaces and the file to look in. `replaced` lists the replacements made in this
process.
"""

import functools
import importlib.util
import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The functions replaced in this process, as "module.name".
replaced: list[str] = []


def _wrap(module: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a module's function with the one that `make` builds from it."""
    original = getattr(module, name)
    setattr(module, name, functools.wraps(original)(make(original)))
    replaced.append(f"{module.__name__}.{name}")


def _argument_reader(function: Callable[..., Any], name: str) -> Callable[[Any, Any], Any]:
    """Return a reader of one argument from a call's (args, kwargs), however it was passed."""
    position = function.__code__.co_varnames.index(name)
    return lambda args, kwargs: kwargs[name] if name in kwargs else args[position]


# ---- the training loop (megatron/training/training.py) -------------------------------------------


def wrap_schedule(run_step: Callable[..., Any]) -> None:
    """Let ``run_step(schedule, *args, **kwargs)`` run every step of Megatron's schedule.

    Every rank asks for the schedule once before training and in every evaluation, after the process
    groups are made. Megatron offers no hook for the start of a step. `pretrain()` accepts a
    P2PCommunicator, but that needs a pipeline group, and `pretrain()` itself makes the groups.
    """
    from megatron.training import training

    def make(original: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: functools.partial(run_step, original(*args, **kwargs))

    _wrap(training, "get_forward_backward_func", make)


def after_training_log(callback: Callable[[int], None]) -> None:
    """Call ``callback(iteration)`` on every rank after every step, counted from 1.

    Megatron calls `training_log` there, and offers no hook. A collective cannot go into the forward
    step, which pipeline stages reach at different times.
    """
    from megatron.training import training

    def make(original: Any) -> Callable[..., Any]:
        iteration_of = _argument_reader(original, "iteration")

        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            callback(iteration_of(args, kwargs))
            return result

        return training_log

    _wrap(training, "training_log", make)


def on_exit_decision(callback: Callable[[int], None]) -> None:
    """Call ``callback(iteration)`` on every rank when Megatron decides to leave its loop.

    Megatron exits with 0 whether it is done or was asked to stop. One function,
    `checkpoint_and_decide_exit`, returns the decision.
    """
    from megatron.training import training

    def make(original: Any) -> Callable[..., Any]:
        iteration_of = _argument_reader(original, "iteration")

        def decide(*args: Any, **kwargs: Any) -> bool:
            leaving = original(*args, **kwargs)
            if leaving:
                callback(iteration_of(args, kwargs))
            return leaving

        return decide

    _wrap(training, "checkpoint_and_decide_exit", make)


def wrap_save(run_save: Callable[..., Any]) -> None:
    """Let ``run_save(save_checkpoint, iteration, *args, **kwargs)`` run every save.

    The function is defined in megatron/training/checkpointing.py and imported by name into
    megatron/training/training.py, so both modules need the replacement.
    """
    from megatron.training import checkpointing, training

    def make(original: Any) -> Callable[..., Any]:
        return lambda iteration, *args, **kwargs: run_save(original, iteration, *args, **kwargs)

    _wrap(training, "save_checkpoint", make)
    checkpointing.save_checkpoint = training.save_checkpoint


# ---- files ---------------------------------------------------------------------------------------


def skip_dataset_compiler() -> None:
    """Skip Megatron's `make` of its dataset helpers if the wheel contains them built.

    The wheel lacks the Makefile that `compile_helpers` needs, so every pip install would exit at
    start-up (megatron/core/datasets/utils.py).
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        _wrap(utils, "compile_helpers", lambda _: lambda: None)


def mark_saves_incomplete() -> None:
    """Mark a checkpoint that is about to be overwritten as incomplete.

    A run that went back to an earlier checkpoint saves some iterations a second time. Megatron
    keeps the old ``metadata.json`` meanwhile, so a kill would leave a mixture that looks complete
    (megatron/core/dist_checkpointing/serialization.py).
    """
    from megatron.core import dist_checkpointing

    def make(original: Any) -> Callable[..., Any]:
        def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
            if os.environ.get("RANK", "0") == "0":
                (Path(checkpoint_dir) / "metadata.json").unlink(missing_ok=True)
            return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

        return save

    _wrap(dist_checkpointing, "save", make)


# ---- the command line ----------------------------------------------------------------------------


def repair_help(parser: ArgumentParser) -> None:
    """Escape bare percent signs in Megatron's help texts, which make ``--help`` crash."""
    formatter: Any = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


# ---- machines without CUDA -----------------------------------------------------------------------


def use_cpu_generator() -> None:
    """Make Megatron's RNG tracker use the CPU generator.

    The tracker uses torch._C and torch.cuda.default_generators, which `topk_megatron.compat.cpu`
    does not replace (megatron/core/tensor_parallel/random.py).
    """
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _wrap(megatron_random, "_get_cuda_rng_state", lambda _: get_state)
    _wrap(megatron_random, "_set_cuda_rng_state", lambda _: set_state)
    # With one generator for both devices, the tracker's warning that the CPU state changed inside
    # a fork is always true and never useful.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def make_host_splits() -> None:
    """Make the experts' all-to-all dispatcher convert its sizes, which already are on the host.

    It converts them to numpy while it moves them from the device, and would otherwise hand tensors
    to torch's all-to-all, which takes integers (megatron/core/transformer/moe/token_dispatcher.py).
    """
    from megatron.core.transformer.moe import token_dispatcher

    def make(original: Any) -> Callable[..., Any]:
        def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            if as_numpy and isinstance(tensor, torch.Tensor):
                return tensor.numpy()
            return original(tensor, as_numpy, record_stream)

        return move

    _wrap(token_dispatcher, "maybe_move_tensor_to_cpu", make)
