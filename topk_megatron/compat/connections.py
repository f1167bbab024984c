"""Chooses CUDA_DEVICE_MAX_CONNECTIONS for the layout of a run.

CUDA reads the variable when it starts, which is before Megatron has read its arguments, and
Megatron's demands on it contradict each other (megatron/training/arguments.py, `validate_args`):

- Up to Hopper, tensor and context parallelism need 1, which keeps kernels in the order in which
  they were launched, so that communication starts before the computation that hides it.
- Both forms of FSDP refuse 1, because their communication must overtake computation.
- --overlap-moe-expert-parallel-comm needs many.

A value that the user exported is never changed.
"""

import ctypes
import functools
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10  # major compute capability
NO_GPU = 0  # what the CPU layer reports in its place
# What Megatron's own warning names for --overlap-moe-expert-parallel-comm.
MANY = "32"
_SIZES = ("tensor_model_parallel_size", "context_parallel_size")
_SWITCHES = (
    "use_torch_fsdp2",
    "use_megatron_fsdp",
    "overlap_moe_expert_parallel_comm",
    "use_mp_args_from_checkpoint_args",
)

_ours: str | None = None  # the value that this module set last
_reason = "not chosen yet"


def choose_connections(args: Namespace, capability: int | None) -> tuple[str | None, str]:
    """Return the value that a layout needs, None for CUDA's own default, and the reason.

    Args:
        args: Megatron's arguments, or those that `peek` found on the command line.
        capability: major compute capability of the GPU; None if unknown, `NO_GPU` on a CPU.
    """
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        return None, "FSDP needs more than 1"
    sizes = [getattr(args, name) for name in _SIZES]
    if capability == NO_GPU:
        return "1", "Megatron asks for it even without a GPU"
    if max(sizes) == 1 and not args.use_mp_args_from_checkpoint_args:
        if args.overlap_moe_expert_parallel_comm:
            return MANY, "--overlap-moe-expert-parallel-comm needs many"
        return None, "this layout needs no particular value"
    if args.overlap_moe_expert_parallel_comm:
        return MANY, "--overlap-moe-expert-parallel-comm needs many; export 1 to favour the others"
    if capability is not None and capability >= BLACKWELL:
        return None, "from Blackwell on, no layout needs 1"
    return "1", "tensor and context parallelism need it up to Hopper"


def set_connections(args: Namespace, capability: int | None) -> None:
    """Set or unset the variable in this process, unless the user exported it."""
    global _ours, _reason
    before = os.environ.get(VARIABLE)
    if before is not None and before != _ours:
        _reason = "exported by the user"
        return
    _ours, _reason = choose_connections(args, capability)
    if _ours is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = _ours


def describe_connections() -> str:
    """Say in one line which value this run has, and why."""
    return f"topk_megatron: {VARIABLE} is {os.environ.get(VARIABLE, 'unset')}: {_reason}"


def peek(arguments: Sequence[str]) -> Namespace:
    """Read the flags that matter here from a command line that nobody has checked yet.

    A value that is not a number counts as left out: Megatron's parser will report it.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_size, default=1)
    for name in _SWITCHES:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.error = _give_up  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return parser.parse_known_args(list(arguments))[0]
    except ValueError:
        return parser.parse_args([])


def _size(text: str) -> int:
    return int(text) if text.isdecimal() else 1


def _give_up(message: str) -> NoReturn:
    raise ValueError(message)


@functools.cache
def compute_capability() -> int | None:
    """Return the first GPU's major compute capability without starting CUDA; None if unknown."""
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        failed = (
            nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            or nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            )
        )
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one without these functions
        return None
    return None if failed else major.value
