"""Finds the compiled kernels and says, once, why the slow reference is used where they are missing.

The kernels are two plain shared libraries beside this file, `_topk_mask_cpu` and
`_topk_mask_cuda`, that register themselves with torch's dispatcher when they are loaded. When
`setup.py` could not build one, it left the compiler's message in `_build_error_<name>.txt`.
"""

import warnings
from functools import cache
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent


class TopKFallbackWarning(UserWarning):
    """The reference, exact but slow, computes a top-k because no kernel can."""


def load_library(name: str, directory: Path = DIRECTORY) -> str | None:
    """Load `_topk_mask_<name>`; return None, or in words why it cannot be had."""
    paths = sorted(directory.glob(f"_topk_mask_{name}*.so"))
    if not paths:
        error = directory / f"_build_error_{name}.txt"
        if error.exists():
            return f"building it failed:\n{error.read_text().strip()}"
        return "it was not built (see 'Building the kernels' in docs/design/0002-operator.md)"
    try:
        torch.ops.load_library(paths[0])
    except (OSError, RuntimeError) as problem:
        return f"{paths[0].name} cannot be loaded: {problem}"
    return None


MISSING: dict[str, str | None] = {
    "cpu": load_library("cpu"),
    "cuda": load_library("cuda") if torch.version.cuda else "this torch has no CUDA",
}


@cache
def warn_fallback(device_type: str) -> None:
    """Warn that the reference is used on this device, and why; once in a process."""
    reason = MISSING.get(device_type, "there is no kernel for this device")
    reason = reason or "the kernel does not take these arguments"
    warnings.warn(
        f"topk_mask runs on {device_type} through its reference, which gives the same results"
        f" but is 10 to 100 times slower than the kernel: {reason}",
        TopKFallbackWarning,
        stacklevel=2,
    )
