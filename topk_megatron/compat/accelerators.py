"""Finds NVIDIA's accelerating packages, and adapts Megatron's flags where they are missing.

Megatron takes Transformer Engine and Apex for granted on a GPU, and fails late if one is missing.
Both come with NVIDIA's NGC images. PyPI has Transformer Engine but not NVIDIA Apex: its project
named apex is a different one, which Megatron would mistake for NVIDIA's.
"""

import functools
import importlib.util
import sys
from argparse import Namespace
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from topk_megatron.errors import ConfigError

# Folders that NVIDIA Apex has and other packages of that name do not.
_OF_APEX = ("multi_tensor_apply", "normalization", "optimizers")


@dataclass(frozen=True)
class Accelerators:
    """The accelerating packages found on this machine.

    Attributes:
        transformer_engine: version of Transformer Engine, or None.
        broken: why an installed Transformer Engine cannot be used, or None.
        apex: whether NVIDIA Apex is installed.
        fused_gradients: whether Apex was built with its fused weight gradients.
    """

    transformer_engine: str | None = None
    broken: str | None = None
    apex: bool = False
    fused_gradients: bool = False


def check_apex() -> bool:
    """Return whether NVIDIA Apex is installed.

    Raises:
        ConfigError: if another package is found under the name `apex`.
    """
    spec = importlib.util.find_spec("apex") if sys.modules.get("apex", "") is not None else None
    if spec is None:
        return False
    places = list(spec.submodule_search_locations or [])
    if any(all((Path(p) / name).is_dir() for name in _OF_APEX) for p in places):
        return True
    where = places[0] if places else spec.origin
    if spec.origin is None:  # a folder of that name on Python's path, such as a clone of Apex
        raise ConfigError(
            f"{where} is a folder that Python imports as `apex`, not an installed NVIDIA Apex; "
            "start from another folder, or remove it from PYTHONPATH"
        )
    raise ConfigError(
        f"the package apex in {where} is not NVIDIA Apex but PyPI's project of the same name, and "
        "Megatron would mistake it for NVIDIA's; run `pip uninstall apex` (NVIDIA Apex comes with "
        "NVIDIA's NGC PyTorch images, and is not needed)"
    )


def hide_accelerators() -> None:
    """Hide both packages from Megatron: their kernels cannot run on a CPU."""
    for name in ("apex", "transformer_engine"):
        sys.modules.setdefault(name, None)  # pyright: ignore[reportArgumentType]


@functools.cache  # otherwise every caller would retry an import that fails
def find_accelerators() -> Accelerators:
    """Look for the packages, importing Transformer Engine to find out whether it works."""
    apex = check_apex()
    fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if sys.modules.get("transformer_engine", "") is None:
        return Accelerators(apex=apex, fused_gradients=fused)
    if importlib.util.find_spec("transformer_engine") is None:
        return Accelerators(apex=apex, fused_gradients=fused)
    try:
        import transformer_engine.pytorch  # pyright: ignore[reportMissingImports] # noqa: F401
    except Exception as error:  # built for another torch or CUDA, or without its torch part
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Accelerators(broken=reason, apex=apex, fused_gradients=fused)
    version = getattr(sys.modules["transformer_engine"], "__version__", None)
    if version is None:
        version = metadata.version("transformer-engine")
    return Accelerators(str(version), None, apex, fused)


def gpu_defaults(found: Accelerators) -> dict[str, Any]:
    """Return new defaults for the flags of Megatron that need a missing package."""
    defaults: dict[str, Any] = {}
    if found.transformer_engine is None:
        defaults |= {"transformer_impl": "local", "apply_rope_fusion": False}
        if not found.apex:
            defaults["no_persist_layer_norm"] = True
    if not found.fused_gradients:
        defaults["gradient_accumulation_fusion"] = False
    return defaults


def check_accelerators(args: Namespace, found: Accelerators) -> None:
    """Refuse flags that need a missing package.

    Raises:
        ConfigError: names the flag, the package, and why a broken package does not load.
    """
    needs = {
        "--transformer-impl transformer_engine": args.transformer_impl == "transformer_engine",
        "--fp8-format": getattr(args, "fp8", None) is not None,
        "--fp4-format": getattr(args, "fp4", None) is not None,
        "--context-parallel-size above 1": args.context_parallel_size > 1,
    }
    why = f", which does not load here ({found.broken})" if found.broken else ""
    for flag, asked in needs.items():
        if asked and found.transformer_engine is None:
            raise ConfigError(
                f"{flag} needs Transformer Engine{why or ', which is not installed'}; install "
                "transformer-engine[pytorch], use NVIDIA's NGC PyTorch image, or drop the flag"
            )
        if asked and args.transformer_impl == "local":
            raise ConfigError(
                f"{flag} needs Transformer Engine's layers; give --transformer-impl "
                "transformer_engine (the default if it is installed) or drop the flag"
            )


def check_gpus(local_rank: int, gpus: int) -> None:
    """Refuse more ranks on a machine than it has GPUs.

    Raises:
        ConfigError: says how many ranks to start.
    """
    if local_rank >= gpus:
        here = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ConfigError(
            f"this machine has {here} and was given at least {local_rank + 1} ranks, but NCCL "
            f"needs a GPU for each rank; start torchrun with --nproc-per-node {gpus}"
        )


def describe(found: Accelerators, args: Namespace) -> str:
    """Say in one line which layers run."""
    if args.transformer_impl == "transformer_engine":
        layers = f"Transformer Engine {found.transformer_engine}"
    elif found.broken:
        layers = f"Megatron's own (Transformer Engine does not load: {found.broken})"
    else:
        layers = "Megatron's own"
    fusion = "fused" if args.gradient_accumulation_fusion else "not fused"
    apex = "NVIDIA Apex" if found.apex else "no Apex"
    return f"topk_megatron: layers: {layers}; {apex}; gradient accumulation {fusion}"
