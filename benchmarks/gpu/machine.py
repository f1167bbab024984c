"""Records the card, the driver, the clocks as read, and the versions; it changes no setting.

python -m benchmarks.gpu.machine --output machine.json
"""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,persistence_mode,ecc.mode.current,mig.mode.current"
)
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "nvdisasm", "nvidia-smi")
PACKAGES = (
    *("torch", "triton", "numpy", "megatron-core", "transformers", "transformer-engine"),
    *("flashinfer-python", "pytest", "hypothesis", "sentencepiece"),
)


def first_lines(*command: str) -> str | None:
    """Return a command's output without empty lines, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (line for line in done.stdout.splitlines() if line.strip())
    return "\n".join(lines) if done.returncode == 0 else None


def read_card() -> dict[str, str]:
    """Return what nvidia-smi says of the first card, by the names of its query."""
    line = first_lines("nvidia-smi", "--id=0", f"--query-gpu={QUERY}", "--format=csv,noheader")
    if line is None:
        return {}
    values = [value.strip() for value in line.splitlines()[0].split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(command: str) -> dict[str, Any]:
    """Return everything that the tables name and that is known without torch."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "commit": first_lines("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "card": read_card(),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "nvcc": (first_lines("nvcc", "--version") or "absent").splitlines()[-1],
        "packages": {package: version(package) for package in PACKAGES},
    }
    card = facts["card"]
    facts["headline"] = f"{card.get('name', 'no card')}, driver {card.get('driver_version')}"
    return facts


def describe_torch() -> dict[str, Any]:
    """Return what torch sees; importing it can take half a minute on a fresh machine."""
    import torch

    facts: dict[str, Any] = {"cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["torch_device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / (1 << 20),
            "memory_gib": properties.total_memory / (1 << 30),
        }
    return facts


def main() -> None:
    """Write the facts, and fail if there is no card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--command", default="", help="the command that this machine is running")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    facts = describe(options.command)
    options.output.write_text(json.dumps(facts, indent=1))
    facts |= describe_torch()
    facts["headline"] += f", torch {facts['packages']['torch']}"
    options.output.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))
    if "torch_device" not in facts:
        raise SystemExit("error: torch finds no CUDA device")
    print(facts["headline"])


if __name__ == "__main__":
    main()
