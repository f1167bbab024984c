"""Loads the compiled kernels, and says once why the slow reference replaces a missing one.

The kernels are two plain shared libraries next to this file, `_topk_mask_cpu` and
`_topk_mask_cuda`, which register themselves with torch's dispatcher when loaded. If `setup.py`
could not build one, it left the compiler's message in `_build_error_<name>.txt`.
"""

import warnings
from functools import cache
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent


class TopKFallbackWarning(UserWarning):
    """No kernel can compute a top-k, so the reference does, which is exact but slow."""


def load_library(name: str, directory: Path = DIRECTORY) -> str | None:
    """Load `_topk_mask_<name>`; return None, or the reason in words if that is impossible."""
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
    """Warn that this device uses the reference, and why; once per process."""
    reason = MISSING.get(device_type, "there is no kernel for this device")
    reason = reason or "the kernel does not accept these arguments"
    warnings.warn(
        f"topk_mask runs on {device_type} through its reference, which gives the same results"
        f" but is 10 to 100 times slower than the kernel: {reason}",
        TopKFallbackWarning,
        stacklevel=2,
    )
