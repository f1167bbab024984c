"""Checks for HEALTHCHECK whether a container can work. Prints a problem and exits with 1.

- The compiled operator exists.
- Where the container has GPUs, the driver answers (a GPU that fell off the bus makes it hang).
- An explorer that listens on its port answers.

It uses no torch, so that a check takes only milliseconds from a training run.
"""

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

OPS = Path(__file__).resolve().parents[1] / "topk_megatron" / "ops"
EXPLORER = 8765
SECONDS = 10


def library_problem(ops: Path) -> str | None:
    """Return the problem if a kernel was not built or is damaged."""
    for note in sorted(ops.glob("_build_error_*.txt")):
        return f"{note.stem.removeprefix('_build_error_')} kernel was not built: {note}"
    libraries = list(ops.glob("_topk_mask_*.so"))
    if not libraries:
        return f"no compiled operator in {ops}"
    for library in libraries:
        with library.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return f"{library} is damaged"
    return None


def gpu_problem(devices: Path = Path("/dev"), command: str = "nvidia-smi") -> str | None:
    """Return the problem if there are GPUs and the driver does not answer."""
    if not any(devices.glob("nvidia[0-9]*")):
        return None
    try:
        done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the GPU driver does not answer: {error}"
    return None if done.returncode == 0 else f"the GPU driver says: {done.stdout.strip()}"


def explorer_problem(port: int = EXPLORER) -> str | None:
    """Return the problem if an explorer listens but does not answer."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)):
            return None  # nothing listens: this container does something else
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SECONDS).close()
    except (OSError, urllib.error.URLError) as error:
        return f"the explorer on port {port} does not answer: {error}"
    return None


def main() -> int:
    """Print the first problem; return the exit code."""
    problem = library_problem(OPS) or gpu_problem() or explorer_problem()
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
