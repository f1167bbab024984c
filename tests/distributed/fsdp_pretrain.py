"""Pretrains with Megatron-FSDP on a CPU, by stand-ins for what it asks of CUDA.

Megatron-FSDP names CUDA devices in strings and builds CUDA device meshes, which the CPU layer does
not serve: users get a refusal. This entry replaces both, so that what a checkpoint of Megatron-FSDP
holds can be tested. One rank only: with two, the save hangs here, one rank waiting in Megatron's
`preprocess_state_dict_for_uneven_dtensor` while the other is past it.
"""

import sys
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


class _Torch(ModuleType):
    """torch, whose CUDA devices are the CPU."""

    device = _AnyDevice("device", (), {})

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
        if name.startswith("megatron.core.distributed.fsdp") and hasattr(module, "torch"):
            module.torch = _Torch("torch")  # pyright: ignore[reportAttributeAccessIssue]


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
