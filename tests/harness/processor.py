"""Names the processor a test run is on: its kernels decide the rounding of sums."""

import os
import platform
from pathlib import Path


def read_cpuinfo() -> str:
    """What Linux says of its processors; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def describe_processor(cpuinfo: str) -> str:
    """Model name, number of logical cores, and whether AVX-512 and AMX are there.

    Args:
        cpuinfo: as `read_cpuinfo` has it. Without x86 flags in it, both features are left out.
    """
    # The first processor's entries come last here, and win.
    pairs = [line.partition(":") for line in reversed(cpuinfo.splitlines())]
    entries = {name.strip(): value.strip() for name, _, value in pairs}
    model = entries.get("model name") or platform.processor() or platform.machine() or "unknown"
    parts = [model, f"{os.cpu_count()} logical cores"]
    if flags := entries.get("flags", "").split():
        for feature, flag in (("AVX-512", "avx512f"), ("AMX", "amx_tile")):
            parts.append(f"{feature} {'yes' if flag in flags else 'no'}")
    return ", ".join(parts)
