"""Megatron on a machine without CUDA: the CPU serves its ``torch.cuda`` calls.

The training code is Megatron's own; only the device underneath differs, as in the vendor back ends
that put Megatron on other chips. Every patch for this device is in this file or in
`topk_megatron.compat.patches`, each with its reason. They are written for torch 2.10 to 2.14 and
megatron-core 0.19.

Only Megatron may see a CUDA device. Other libraries in the process (transformers, torch's own
modules) call the same functions, and would choose a device that does not exist. Each patched
function therefore checks its caller, and behaves as torch's own for all others.
"""

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]


# What sees the CPU as a CUDA device: Megatron, our packages that run inside its loop, and the job's
# script. Our other packages see the machine as it is, like every library.
_SERVED = frozenset(
    [
        "megatron",
        "__main__",
        *(f"topk_megatron.{p}" for p in ("model", "parallel", "plan", "train")),
    ]
)


def redirect_cuda_to_cpu() -> None:
    """Patch torch, then the few places of Megatron that bypass torch's Python interface."""
    _keep_device_contexts()
    _patch_cuda_functions()
    _patch_streams()
    _patch_factories()
    _patch_tensor_methods()
    _patch_tensor_types()
    _patch_accelerator()
    _patch_data_loader()
    from topk_megatron.compat.patches import make_host_splits, use_cpu_generator

    use_cpu_generator()
    make_host_splits()


def _keep_device_contexts() -> None:
    """Register torch's own factories for ``with torch.device(...)`` before they are replaced.

    The context recognises a factory by identity, from a set that torch builds when a context is
    first entered. Built after the patches, the set would hold our wrappers, and no tensor would
    follow a context any more: a model built on the meta device would get uninitialised memory.
    """
    from torch.utils import _device

    _device._device_constructors()


def _is_served() -> bool:
    """Return whether the caller of a patched function runs inside Megatron's loop."""
    caller: str = sys._getframe(2).f_globals.get("__name__", "")
    first, _, rest = caller.partition(".")
    return first in _SERVED or f"{first}.{rest.partition('.')[0]}" in _SERVED


def _for_megatron(answer: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `answer` for Megatron and `stock` for others."""

    @functools.wraps(stock)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return answer(*args, **kwargs) if _is_served() else stock(*args, **kwargs)

    return patched


def _to_cpu(device: Any) -> Any:
    """Map a CUDA device, in any of torch's spellings, to the CPU; leave others alone."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str) and device.startswith("cuda"):
        return torch.device("cpu")
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")  # an int is a CUDA ordinal in every torch signature
    return device


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _constant(value: Any) -> Callable[..., Any]:
    # A new function for every name: torch._dynamo maps functions to rules, and refuses one object
    # under two names.
    return lambda *_, **__: value


def _patch_cuda_functions() -> None:
    cuda: Any = torch.cuda
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=total_memory,
        multi_processor_count=os.cpu_count(),
    )
    # Megatron asserts that CUDA is available, and expects one device per local rank.
    cuda.is_available = _for_megatron(lambda: True, cuda.is_available)
    cuda.is_initialized = _for_megatron(lambda: True, cuda.is_initialized)
    cuda.device_count = _for_megatron(
        lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cuda.device_count
    )
    cuda.current_device = _constant(torch.device("cpu"))
    cuda.get_device_properties = _constant(properties)
    cuda.get_device_capability = _constant((0, 0))
    cuda.get_device_name = _constant("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "init", "_lazy_init"):
        setattr(cuda, name, _constant(None))
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.is_current_stream_capturing = _constant(False)
    # Logs show the process's resident set in bytes, the CPU's nearest equivalent.
    for name in ("memory_allocated", "memory_reserved", "device_memory_used"):
        setattr(cuda, name, lambda *_, **__: _resident_bytes())
    for name in ("max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: _peak_resident_bytes())
    cuda.memory_stats = lambda *_, **__: _MemoryStats()
    cuda.reset_peak_memory_stats = _constant(None)
    # One generator serves both devices: operators on CPU tensors draw from the default one only.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.manual_seed_all = _constant(None)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant(None))
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()


class _MemoryStats(dict[str, int]):
    """The counters of `torch.cuda.memory_stats` that Megatron logs; all others are 0."""

    def __missing__(self, key: str) -> int:
        if key.endswith("bytes.all.current"):
            return _resident_bytes()
        if key.endswith("bytes.all.peak"):
            return _peak_resident_bytes()
        return 0


class _Stream:
    """A stream without effect: work on the CPU is done when its call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Event:
    """Remembers the host time at which it was recorded, for `elapsed_time`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded = time.perf_counter()

    def record(self, *_: Any) -> None:
        self._recorded = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """Return milliseconds, as `torch.cuda.Event.elapsed_time` does."""
        return 1e3 * (end._recorded - self._recorded)


def _patch_streams() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = _constant(stream)
    cuda.default_stream = _constant(stream)
    cuda.set_stream = _constant(None)
    cuda.stream = lambda *_: contextlib.nullcontext()


def _patch_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if ("device" in kwargs or "pin_memory" in kwargs) and _is_served():
            if kwargs.get("device") is not None:
                kwargs["device"] = _to_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # pinning asks the CUDA driver
        return factory(*args, **kwargs)

    return wrapper


def _patch_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    original_to, original_type = tensor.to, tensor.type
    # Megatron compares the names of tensor types (clip_grads.py, distrib_optimizer.py).
    type_names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
    }

    @functools.wraps(original_to)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (args or "device" in kwargs) and _is_served():
            if args:
                args = (_to_cpu(args[0]), *args[1:])
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not _is_served():
            return original_type(self, dtype, *args, **kwargs)
        if dtype is None and self.dtype in type_names:
            return type_names[self.dtype]
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    tensor.to, tensor.type = to, type_
    for name in ("cuda", "pin_memory", "record_stream"):
        setattr(tensor, name, _for_megatron(lambda self, *_, **__: self, getattr(tensor, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    module: Any = torch.nn.Module
    module.cuda = _for_megatron(lambda self, *_, **__: self, module.cuda)


class _TensorType(type):
    """A type like `torch.cuda.FloatTensor`, for isinstance() checks."""

    dtype: torch.dtype

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.Tensor) and instance.dtype == cls.dtype


def _patch_tensor_types() -> None:
    # Float16Module converts the inputs that isinstance() reports to be of these types.
    names = {"FloatTensor": torch.float32, "HalfTensor": torch.float16}
    names["BFloat16Tensor"] = torch.bfloat16
    for name, dtype in names.items():
        setattr(torch.cuda, name, _TensorType(name, (), {"dtype": dtype}))


def _patch_accelerator() -> None:
    # torch's own code (DataLoader, checkpoint, distributed) must still see a machine without an
    # accelerator, whatever torch.cuda.is_available() reports to Megatron.
    accelerator: Any = torch.accelerator
    accelerator.is_available = _constant(False)
    accelerator.current_accelerator = _constant(None)
    accelerator.device_count = _constant(0)


def _patch_data_loader() -> None:
    # A DataLoader draws a seed from the CPU generator when it is iterated. On a GPU machine no
    # model uses that generator. Here dropout does, and a resumed run, which restores the generator
    # before it opens its data, would continue with different masks from the interrupted run.
    loader: Any = torch.utils.data.DataLoader
    original = loader.__iter__

    @functools.wraps(original)
    def __iter__(self: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    loader.__iter__ = __iter__
