"""Names the processor of a test run, because its kernels decide the rounding of sums."""

import os
import platform
from pathlib import Path


def read_cpuinfo() -> str:
    """Return what Linux reports about its processors; empty on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def describe_processor(cpuinfo: str) -> str:
    """Return the model name, the number of logical cores, and whether AVX-512 and AMX exist.

    Args:
        cpuinfo: The text from `read_cpuinfo`. If it has no x86 flags, both features are left out.
    """
    # In reverse order, the first processor's entries come last and win.
    pairs = [line.partition(":") for line in reversed(cpuinfo.splitlines())]
    entries = {name.strip(): value.strip() for name, _, value in pairs}
    model = entries.get("model name") or platform.processor() or platform.machine() or "unknown"
    parts = [model, f"{os.cpu_count()} logical cores"]
    if flags := entries.get("flags", "").split():
        for feature, flag in (("AVX-512", "avx512f"), ("AMX", "amx_tile")):
            parts.append(f"{feature} {'yes' if flag in flags else 'no'}")
    return ", ".join(parts)
