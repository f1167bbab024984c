"""Counts the machine instructions of the forward kernel by pipe, without a GPU.

    python tests/cuda/count.py [--hidden 2048 ...] [--dtype bfloat16 ...] [--k H/32 64 ...]
                               [--rows normal ...] [--mode value]

It executes ptxas's sm_90 code in the emulator, compares every result with the definition, and
prints a Markdown table. Counts are exact. The times are the largest of what the pipes' rates, the
issue rate and memory need at least (tests/cuda/hopper.py): limits that a kernel cannot beat, not a
prediction and no measurement. TOPK_CSRC names another folder of kernel sources, such as one of
another clone.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.rows, when it runs as a script

from emulated import CSRC, DTYPES, find_compiler
from hopper import BYTES_PER_SECOND, HALF_COMPARE, PIPES, Estimate, by_pipe, least_time
from machine_code import Program, Toolchain, find_cuda_tool, find_nvcc
from runner import WARP_LANES, Counters, Forward, run_cases

from tests.rows import KINDS, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference

NUM_ROWS = 32  # eight for a warp of the one block that runs, as 16,384 rows are on an H100
HIDDEN = (1024, 2048, 4096, 8192, 16384)
SHARES = ("H/32", "H/16", "H/8")
SEED = 7


@dataclass(frozen=True)
class Shape:
    """What is counted."""

    dtype: str
    hidden: int
    k: int
    kind: str = "normal"
    mode: str = "value"

    @property
    def row_bytes(self) -> float:
        """Return the bytes of a row that are read and written: x, y and the bits."""
        return self.hidden * (2 * DTYPES[self.dtype].itemsize + 1 / 8)

    @property
    def copy_bytes(self) -> float:
        """Return the bytes of a row that a copy reads and writes."""
        return self.hidden * 2.0 * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Count:
    """Thread instructions per element; a warp instruction is 32, whatever its active lanes."""

    num_rows = NUM_ROWS

    shape: Shape
    counters: Counters
    issued: float
    pipes: dict[str, float]

    def time(self, device: str, half_compare: str) -> Estimate:
        """Return the least time of a row."""
        pipes = {pipe: count * self.shape.hidden for pipe, count in self.pipes.items()}
        return least_time(
            pipes, self.issued * self.shape.hidden, self.shape.row_bytes, device,
            half_compare=half_compare,
        )  # fmt: skip


def parse_k(text: str, hidden: int) -> int:
    """Return k from "64" or "H/32"."""
    return hidden // int(text[2:]) if text.startswith("H/") else int(text)


def count_shapes(program: Program, shapes: Iterable[Shape], folder: Path) -> list[Count]:
    """Execute each shape's rows and count.

    Raises:
        RuntimeError: a result differs from the definition, or the emulator complained.
    """
    shapes = list(shapes)
    cases = [
        Forward(make_rows(s.kind, (NUM_ROWS, s.hidden), DTYPES[s.dtype], seed=SEED), s.k, s.mode)
        for s in shapes
    ]
    counts = []
    for shape, case, outcome in zip(shapes, cases, run_cases(program, cases, folder), strict=True):
        y_RH, bits = topk_mask_reference(case.x_RH, case.k, case.mode)
        same = torch.equal(as_bits(outcome.out_RH), as_bits(y_RH))
        if not same or outcome.bits is None or not torch.equal(outcome.bits, bits):
            raise RuntimeError(f"the machine code's result differs from the definition: {shape}")
        counters, elements = outcome.counters, case.x_RH.numel()
        pipes = by_pipe(counters.opcodes)
        per_element = {pipe: pipes[pipe] * WARP_LANES / elements for pipe in PIPES}
        issued = counters.warp_instructions * WARP_LANES / elements
        counts.append(Count(shape, counters, issued, per_element))
    return counts


def _time_cell(count: Count, device: str) -> str:
    low, high = (count.time(device, half_compare=pipe) for pipe in ("FMA", "ALU"))
    if low.seconds > high.seconds:
        low, high = high, low
    first, second = (f"{estimate.seconds * 1e9:.2f}" for estimate in (low, high))
    return f"{first} {low.limit}" if first == second else f"{first} to {second} {high.limit}"


def table(counts: list[Count]) -> str:
    """Return the counts as a Markdown table."""
    shown = [pipe for pipe in PIPES if pipe != HALF_COMPARE]
    shown.insert(3, HALF_COMPARE)
    devices = [f"{d} {what}" for d in BYTES_PER_SECOND for what in ("ns/row", "copy")]
    header = ["dtype", "H", "k", "rows", "kernel", "issue", *shown, *devices]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for count in counts:
        shape = count.shape
        kernel = count.counters.kernel.rsplit("_", 1)[-1]
        numbers = [f"{count.issued:.1f}", *(f"{count.pipes[pipe]:.1f}" for pipe in shown)]
        for device, bandwidth in BYTES_PER_SECOND.items():
            numbers += [_time_cell(count, device), f"{shape.copy_bytes / bandwidth * 1e9:.2f}"]
        cells = [shape.dtype, shape.hidden, shape.k, shape.kind, kernel, *numbers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


LEGEND = """
Thread instructions per element of sm_90 machine code, a warp instruction counted as 32. FMA
includes FMA heavy. Times are limits at full occupancy, not measurements: the largest of pipes,
issue and memory, which is named beside it. "a to b": half compares in the FMA pipe, or in the ALU.
"""


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count the forward kernel's machine instructions by pipe, without a GPU."
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--k", nargs="+", default=SHARES, metavar="K", help="64 or H/32")
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=["normal"])
    parser.add_argument("--mode", choices=("value", "abs"), default="value")
    return parser.parse_args()


def main() -> int:
    """Print the table."""
    arguments = _parse_arguments()
    nvcc, compiler, cuobjdump = find_nvcc(), find_compiler(), find_cuda_tool("cuobjdump")
    if nvcc is None or compiler is None or cuobjdump is None:
        print("count.py needs nvcc, a C++ compiler and cuobjdump on PATH", file=sys.stderr)
        return 1
    shapes = [
        Shape(dtype, hidden, parse_k(k, hidden), kind, arguments.mode)
        for dtype in arguments.dtype
        for hidden in arguments.hidden
        for k in arguments.k
        for kind in arguments.rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = Toolchain(nvcc, compiler, Path(folder) / "toolchain", CSRC).sass_program(
            cuobjdump
        )
        print(table(count_shapes(program, shapes, Path(folder))))
    print(LEGEND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
