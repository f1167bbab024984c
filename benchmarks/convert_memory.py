"""Measures the peak memory of tools/convert_checkpoint.py on a synthetic checkpoint, both ways.

    python benchmarks/convert_memory.py --gigabytes 2 --output benchmarks/results/convert_memory.md

The figure is the peak resident size of a conversion (VmHWM, mapped pages included) minus that of
the same interpreter with the same imports and no work.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from topk_megatron.config import TopKConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' harness
from tests.harness.launch import REPOSITORY
from tests.harness.synthetic import synthetic_config, write_synthetic_checkpoint

_HIDDEN, _FFN, _VOCABULARY = 2048, 5504, 32000
_TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"
# VmHWM begins with the program; getrusage's peak would include the process before exec.
_RUN = """
import atexit, re, runpy, sys
report, tool, name, *arguments = sys.argv[1:]
def peak():
    status = open("/proc/self/status").read()
    open(report, "w").write(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
atexit.register(peak)
sys.argv = [tool, *arguments]
import torch, tqdm, transformers
runpy.run_path(tool, run_name=name)
"""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--directory", type=Path, help="parent of the temporary working directory")
    return parser.parse_args()


def measure(work: Path, *arguments: str | Path, idle: bool = False) -> tuple[float, float]:
    """Run the tool to its end, and return its peak resident megabytes and its seconds."""
    start = time.perf_counter()
    report, name = work / "peak", "idle" if idle else "__main__"
    command = [sys.executable, "-c", _RUN, report, _TOOL, name, *arguments]
    subprocess.run(list(map(str, command)), env=_environment(), check=True)
    return int(report.read_text()) * 1024 / 1e6, time.perf_counter() - start


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def make_checkpoint(directory: Path, num_bytes: float) -> float:
    """Write a bfloat16 checkpoint of about `num_bytes`, and return its gigabytes."""
    layer = 4 * _HIDDEN**2 + 3 * _HIDDEN * _FFN
    embeddings = 2 * _VOCABULARY * _HIDDEN
    layers = max(1, round((num_bytes / 2 - embeddings) / layer))
    config = synthetic_config(
        hidden_size=_HIDDEN,
        intermediate_size=_FFN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=_VOCABULARY,
    )
    topk = TopKConfig(hidden_size=_HIDDEN, num_layers=layers, k=128, layers=(0,))
    written = write_synthetic_checkpoint(directory, config, topk=topk, dtype=torch.bfloat16)
    return sum(file.stat().st_size for file in written.iterdir()) / 1e9


def main() -> None:
    """Measure, and print or write the table."""
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        work = Path(name)
        size = make_checkpoint(work / "megatron", args.gigabytes * 1e9)
        idle, _ = measure(work, idle=True)
        first, second, third = work / "megatron", work / "hf", work / "again"
        there = measure(work, "to-hf", "--load", first, "--save", second, "--no-tokenizer")
        back = measure(work, "to-megatron", "--load", second, "--save", third, "--no-tokenizer")
    text = _table(size, idle, {"to-hf": there, "to-megatron": back})
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)


def _table(size: float, idle: float, runs: dict[str, tuple[float, float]]) -> str:
    largest = _VOCABULARY * _HIDDEN * 2 / 1e6
    lines = [
        "# Peak memory of a conversion",
        "",
        f"A synthetic bfloat16 checkpoint of {size:.2f} GB, largest tensor {largest:.0f} MB; "
        f"{platform.machine()}, torch {torch.__version__}. Made by "
        f"`python benchmarks/convert_memory.py --gigabytes {size:.0f}`.",
        "",
        "| | peak RSS, MB | above the idle interpreter, MB | times the largest tensor | seconds |",
        "|---|---|---|---|---|",
        f"| interpreter with imports | {idle:.0f} | | | |",
    ]
    for name, (peak, seconds) in runs.items():
        above = peak - idle
        lines.append(
            f"| {name} | {peak:.0f} | {above:.0f} | {above / largest:.1f} | {seconds:.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
