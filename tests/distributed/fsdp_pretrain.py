"""Pretrains with Megatron-FSDP on a CPU, by stand-ins for what it asks of CUDA.

Megatron-FSDP names CUDA devices in strings and builds CUDA device meshes, which the CPU layer does
not serve: users get a refusal. This entry replaces both, so that what a checkpoint of Megatron-FSDP
holds can be tested. One rank only: with two, the save hangs here, one rank waiting in Megatron's
`preprocess_state_dict_for_uneven_dtensor` while the other is past it.

Gathering and reducing over one rank are copies, and are done as such. Megatron-FSDP coalesces them
in place, which gloo does in threads of its own: one run in fifty ended in "malloc(): unaligned
tcache chunk detected" or a segmentation fault, with the crash in one of these threads.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device

Device = torch.device


class _AnyDevice(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Device)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str) and args[0].startswith("cuda"):
            return Device("cpu")
        return Device(*args, **kwargs)


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Return at once."""


@contextlib.contextmanager
def _coalesce_nothing(*_: Any, **__: Any) -> Iterator[_Done]:
    yield _Done()


class _Alone(ModuleType):
    """torch.distributed, in which gathering and reducing over a group of one rank copy."""

    @staticmethod
    def all_gather_into_tensor(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any
    ) -> _Done:
        assert group.size() == 1
        output_tensor.copy_(input_tensor)
        return _Done()

    @staticmethod
    def reduce_scatter_tensor(
        output: torch.Tensor, input: torch.Tensor, group: Any, **_: Any
    ) -> _Done:
        assert group.size() == 1
        output.copy_(input)
        return _Done()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)


class _Torch(ModuleType):
    """torch, whose CUDA devices are the CPU."""

    device = _AnyDevice("device", (), {})
    distributed = _Alone("torch.distributed")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def serve_fsdp() -> None:
    """Replace what Megatron-FSDP takes from torch."""
    from torch.distributed.device_mesh import DeviceMesh

    make = DeviceMesh.__init__

    def on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, "cpu", *args, **kwargs)

    DeviceMesh.__init__ = on_cpu
    from_group = DeviceMesh.from_group

    def group_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, "cpu", *args, **kwargs)

    DeviceMesh.from_group = staticmethod(group_on_cpu)
    import megatron.core.distributed.fsdp.mcore_fsdp_adapter  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core.distributed.fsdp"):
            for replaced, stand_in in (
                ("torch", _Torch("torch")),
                ("_coalescing_manager", _coalesce_nothing),
            ):
                if hasattr(module, replaced):
                    setattr(module, replaced, stand_in)


@exit_on_user_error
def main() -> None:
    """Train, past the check that refuses Megatron-FSDP without a GPU."""
    device = prepare_device()
    serve_fsdp()
    from topk_megatron.train import checks
    from topk_megatron.train.main import run

    checks._check_cpu = lambda _: None
    run(device)


if __name__ == "__main__":
    main()
