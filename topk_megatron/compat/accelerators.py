"""Finds what Megatron's fused kernels need, and adapts its flags where something is missing.

Megatron takes Transformer Engine, Apex and a C compiler for granted on a GPU, and fails late if one
is missing, mostly in the first forward pass. The packages come with NVIDIA's NGC images. PyPI has
Transformer Engine but not NVIDIA Apex: its project named apex is a different one, which Megatron
would mistake for NVIDIA's.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from argparse import Namespace
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from topk_megatron.errors import ConfigError

# Folders that NVIDIA Apex has and other packages of that name do not.
_OF_APEX = ("multi_tensor_apply", "normalization", "optimizers")


# Modules that Apex builds only if asked to. Megatron's wheel has none of them.
SOFTMAX_MODULES = (
    "scaled_upper_triang_masked_softmax_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_softmax_cuda",
)
GRADIENT_MODULE = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Accelerators:
    """What was found on this machine.

    Attributes:
        transformer_engine: version of Transformer Engine, or None.
        broken: why an installed Transformer Engine cannot be used, or None.
        apex: whether NVIDIA Apex is installed.
        fused_gradients: whether Apex was built with its fused weight gradients.
        fused_softmax: whether Apex was built with its masked softmax.
        no_compiler: why torch.compile cannot build kernels for the GPU, or None if it can.
    """

    transformer_engine: str | None = None
    broken: str | None = None
    apex: bool = False
    fused_gradients: bool = False
    fused_softmax: bool = False
    no_compiler: str | None = None


@dataclass(frozen=True)
class Missing:
    """A default of Megatron that cannot work here.

    Attributes:
        argument: its name in Megatron's arguments.
        value: the default that works.
        name: what is switched off, in words.
        needs: what it needs and does not find.
    """

    argument: str
    value: Any
    name: str
    needs: str


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
    version, broken = _find_transformer_engine()
    return Accelerators(
        transformer_engine=version,
        broken=broken,
        apex=check_apex(),
        fused_gradients=_exists(GRADIENT_MODULE),
        fused_softmax=all(map(_exists, SOFTMAX_MODULES)),
        no_compiler=find_no_compiler(),
    )


def _exists(module: str) -> bool:
    return sys.modules.get(module, "") is not None and importlib.util.find_spec(module) is not None


def _find_transformer_engine() -> tuple[str | None, str | None]:
    """Return its version, and why it cannot be used although it is installed."""
    if not _exists("transformer_engine"):
        return None, None
    try:
        import transformer_engine.pytorch  # pyright: ignore[reportMissingImports] # noqa: F401
    except Exception as error:  # built for another torch or CUDA, or without its torch part
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
    version = getattr(sys.modules["transformer_engine"], "__version__", None)
    return str(version or metadata.version("transformer-engine")), None


def find_no_compiler() -> str | None:
    """Return what torch.compile lacks to build kernels for a GPU, or None if it has everything.

    Triton compiles a small C file for every kernel, by the same search for a compiler.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h (package python3-dev)"
    return None


def missing_defaults(found: Accelerators, args: Namespace) -> list[Missing]:
    """List the defaults of Megatron that need something missing, given the other arguments."""
    apex = "NVIDIA Apex"
    missing = []
    if found.transformer_engine is None:
        missing.append(
            Missing("apply_rope_fusion", False, "rotary embedding", "Transformer Engine")
        )
    is_local = args.transformer_impl == "local"
    # Without Transformer Engine's layers Apex has a LayerNorm, and nothing but torch an RMSNorm.
    # Megatron reads the normalization from a checkpoint only later.
    has_norm = args.normalization == "LayerNorm" and not args.use_checkpoint_args
    if is_local and not (has_norm and found.apex):
        needs = apex if has_norm else "Transformer Engine layers"
        missing.append(Missing("no_persist_layer_norm", True, "persistent norm", needs))
    if not found.fused_gradients:
        needs = f"{GRADIENT_MODULE} of {apex}"
        missing.append(Missing("gradient_accumulation_fusion", False, "weight gradients", needs))
    if (is_local or args.attention_backend.name == "local") and not found.fused_softmax:
        needs = f"{SOFTMAX_MODULES[1]} of {apex}"
        missing.append(Missing("masked_softmax_fusion", False, "masked softmax", needs))
    if found.no_compiler is not None:
        for name, words in (("gelu", "GELU"), ("swiglu", "SwiGLU"), ("dropout", "dropout")):
            missing.append(
                Missing(f"bias_{name}_fusion", False, f"bias and {words}", found.no_compiler)
            )
    return missing


def gpu_defaults(found: Accelerators) -> dict[str, Any]:
    """Return new defaults that do not depend on other arguments."""
    return {} if found.transformer_engine is not None else {"transformer_impl": "local"}


# Flags that need Transformer Engine, by the argument and what it is where nobody asked. Some need
# its layers; the others need the package, whatever the layers.
_NEED_LAYERS = {
    "--fp8-format": ("fp8", None),
    "--fp4-format": ("fp4", None),
    "--context-parallel-size above 1": ("context_parallel_size", 1),
    "--multi-latent-attention": ("multi_latent_attention", False),
    "--tp-comm-overlap": ("tp_comm_overlap", False),
    "--use-te-activation-func": ("use_te_activation_func", False),
    "--use-transformer-engine-op-fuser": ("use_transformer_engine_op_fuser", False),
    "--fused-residual-rmsnorm": ("fused_residual_rmsnorm", False),
    "--te-precision-config-file": ("te_precision_config_file", None),
}
_NEED_PACKAGE = {
    "--cpu-offloading-num-layers": ("cpu_offloading_num_layers", 0),
    "--delay-wgrad-compute": ("delay_wgrad_compute", False),
    "--moe-permute-fusion": ("moe_permute_fusion", False),
    "--moe-router-fusion": ("moe_router_fusion", False),
    "--te-rng-tracker": ("te_rng_tracker", False),
    "--use-precision-aware-optimizer": ("use_precision_aware_optimizer", False),
}


def _asked(args: Namespace, table: dict[str, tuple[str, Any]]) -> list[str]:
    return [flag for flag, (name, idle) in table.items() if getattr(args, name, idle) != idle]


def check_accelerators(args: Namespace, found: Accelerators) -> None:
    """Refuse flags that need a missing package.

    Raises:
        ConfigError: names the flag, the package, and why a broken package does not load.
    """
    is_local = args.transformer_impl == "local"
    need_layers = _asked(args, _NEED_LAYERS)
    asked = [] if is_local else [f"--transformer-impl {args.transformer_impl}"]
    asked += need_layers + _asked(args, _NEED_PACKAGE)
    if asked and found.transformer_engine is None:
        why = f"does not load here ({found.broken})" if found.broken else "is not installed"
        raise ConfigError(
            f"{asked[0]} needs Transformer Engine, which {why}; install "
            "transformer-engine[pytorch], use NVIDIA's NGC PyTorch image, or drop the flag"
        )
    if need_layers and is_local:
        raise ConfigError(
            f"{need_layers[0]} needs Transformer Engine's layers; give --transformer-impl "
            "transformer_engine (the default if it is installed) or drop the flag"
        )
    if args.defer_embedding_wgrad_compute and not found.fused_gradients:
        raise ConfigError(
            f"--defer-embedding-wgrad-compute needs NVIDIA Apex's {GRADIENT_MODULE}, which is not "
            "installed; use NVIDIA's NGC PyTorch image, or drop the flag"
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
    """Say in one line which layers run, and which fused kernels are off for want of what."""
    if args.transformer_impl == "transformer_engine":
        layers = f"Transformer Engine {found.transformer_engine}"
    elif found.broken:
        layers = f"Megatron's own (Transformer Engine does not load: {found.broken})"
    elif found.transformer_engine is None:
        layers = "Megatron's own (Transformer Engine is not installed)"
    else:
        layers = "Megatron's own"
    off: dict[str, list[str]] = {}
    for item in missing_defaults(found, args):
        off.setdefault(item.needs, []).append(item.name)
    reasons = "; ".join(f"{', '.join(names)} (needs {needs})" for needs, names in off.items())
    return f"topk_megatron: layers: {layers}" + (f"; not fused: {reasons}" if off else "")
