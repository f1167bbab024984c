"""Seeds faults into the CUDA kernel, one at a time, and shows which test notices each.

    python tests/cuda/mutants.py [--part I/N] [name ...]

Every mutant is a textual change of a `.cuh` file. It faces the kernels' source first and, if that
passes and nvcc is on PATH, the PTX. The script prints a Markdown table; its exit
status is the number of survivors. benchmarks/results/topk_mask_mutants.md holds the results.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine_code import find_nvcc

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "topk_megatron" / "ops" / "csrc"
FAST_BUILD = {"TOPK_EMULATION_OPTIMISATION": "-O1"}  # runs 90 times faster than -O0
SUITES = ("test_cuda_source.py", "test_cuda_sparse.py", "test_cuda_ptx.py")


@dataclass(frozen=True)
class Mutant:
    """One fault: replaces `old`, which occurs once in the kernel, by `new`.

    Attributes:
        name: what the fault is.
        old: the text to replace.
        new: the text to put there.
        equivalent: why no test can notice the fault; empty if one can. Such a mutant is not run.
        assembly: the fault is in what only nvcc compiles, so that only the PTX can show it.
    """

    name: str
    old: str
    new: str
    equivalent: str = ""
    assembly: bool = False


MUTANTS = (
    # barriers
    Mutant(
        "no barrier between warps' exchange and its reads",
        "    __syncthreads();\n    return lane < warps",
        "    return lane < warps",
    ),
    Mutant("one exchange buffer instead of two", "    turn_ ^= 1;\n", ""),
    # how values compare
    Mutant(
        "assembly: a half that is NaN is above nothing",
        'TOPK_COMPARE_HALVES("gtu", mask',
        'TOPK_COMPARE_HALVES("gt", mask',
        assembly=True,
    ),
    Mutant(
        "a float32 NaN is above nothing (source)",
        "return !(as_float(compared(word)) <= as_float(bound));\n#endif",
        "return as_float(compared(word)) > as_float(bound);\n#endif",
    ),
    Mutant(
        "a half that is NaN is above nothing (source)",
        "[](float x, float y) { return !(x <= y); }",
        "[](float x, float y) { return x > y; }",
    ),
    Mutant(
        "infinity counts as NaN (halves)",
        "(magnitude & 0xffffu) > kInfinity",
        "(magnitude & 0xffffu) >= kInfinity",
    ),
    Mutant(
        "infinity counts as NaN (float32)",
        "(word & 0x7fffffffu) > kInfinity",
        "(word & 0x7fffffffu) >= kInfinity",
    ),
    Mutant("mode abs compares signs (source)", "if (kAbs) word &= 0x7fff7fffu;", ""),
    Mutant("pads are zeros", "kAbs ? 0 : (0x8000u | kInfinity) * 0x10001u;", "0;"),
    Mutant("float32 pads are zeros", "kAbs ? 0 : 0xff800000u;", "0;"),
    Mutant(
        "a sum of masks is read without its sign",
        "const uint32_t counts = 0 - sum",
        "const uint32_t counts = sum",
    ),
    Mutant(
        "counts of upper halves are lost",
        "(low + low + (counts >> 16)) & 0xffffu",
        "(low + low) & 0xffffu",
    ),
    Mutant(
        "a bound of negative order is not turned around",
        "((order ^ (order >> 31 & 0x7fff)) & 0xffffu)",
        "(order & 0xffffu)",
    ),
    # search
    Mutant(
        "off by one: above > k ends the search", "if (above == k) break;", "if (above >= k) break;"
    ),
    Mutant(
        "off by one: k elements above are too few",
        "const bool at_low = above > k;",
        "const bool at_low = above > k + 1;",
    ),
    Mutant(
        "the bracket closes one order early",
        "if (bracket.width() == 1) {",
        "if (bracket.width() <= 2) {",
    ),
    Mutant(
        "ties at the lower end",
        "found = {bracket.high, k - bracket.above_high};",
        "found = {bracket.low, k - bracket.above_high};",
    ),
    Mutant(
        "one tie too few",
        "found = {bracket.high, k - bracket.above_high};",
        "found = {bracket.high, k - bracket.above_high - 1};",
    ),
    Mutant(
        "a step of nothing",
        "step = step < 1 ? 1 :",
        "step = step < 1 ? 0 :",
        "only slower: halving, which takes turns with interpolation, moves on",
    ),
    Mutant(
        "a step past the bracket",
        "step > most ? most : step;",
        "step > most + 1 ? most + 1 : step;",
        "only slower: halving, which takes turns with interpolation, moves on",
    ),
    Mutant(
        "a jump ends at the value instead of below it",
        "static_cast<int>(of_row ^ kSign) - 1;",
        "static_cast<int>(of_row ^ kSign);",
    ),
    Mutant(
        "a jump takes the value's lower neighbour",
        "bracket.high = static_cast<int>(of_row ^ kSign);",
        "bracket.high = static_cast<int>(of_row ^ kSign) - 1;",
    ),
    Mutant(
        "jumps compare orders as unsigned words",
        "constexpr uint32_t kSign = 0x80000000u;  // turns",
        "constexpr uint32_t kSign = 0;  // turns",
    ),
    Mutant("zero's order is that of +0", "return half == 0 ? -1 :", "return"),
    Mutant("float32 zero's order is that of +0", "return bits == 0 ? -1 :", "return"),
    Mutant(
        "the forecast may be a NaN",
        "found.order < Fmt::kOrders.top ? found.order : found.order - 1;",
        "found.order;",
    ),
    Mutant(
        "no jumps",
        "const bool jumps = in_gap &&",
        "const bool jumps = false && in_gap &&",
        "only slower: the instruction budget of unusual rows is held by test_cuda_sass.py",
    ),
    Mutant(
        "a cold forecast for every row",
        "  forecast.order = found.order < ",
        "  forecast = cold_forecast<Fmt>(hidden);\n  if (false) forecast.order = found.order < ",
        "only slower: the instruction budget is held by test_cuda_sass.py",
    ),
    # ties
    Mutant("cut one lane late", "up_to_here >= wanted)", "up_to_here > wanted)"),
    Mutant(
        "cut one chunk late",
        "if (passed >= wanted) return;",
        "if (passed > wanted) return;",
        "the later chunk's first slot becomes the cut, with none of its own ties",
    ),
    Mutant(
        "ties of earlier chunks are forgotten",
        "up_to_here = before_chunk + inclusive",
        "up_to_here = inclusive",
    ),
    Mutant(
        "warps before this one are not counted",
        "locate_cut<Fmt>(chunks, ties, wanted - before, team.lane)",
        "locate_cut<Fmt>(chunks, ties, wanted, team.lane)",
    ),
    Mutant("other warps' pads count as ties", "if (chunks.owns(v)) count += ties", "count += ties"),
    Mutant(
        "a warp's last tie is dropped",
        "if (before + of_warp <= wanted) return kEveryTie;",
        "if (before + of_warp < wanted) return kEveryTie;",
        "the cut is then located at the warp's last tie, with that tie taken",
    ),
    Mutant(
        "a warp whose ties are not wanted takes one",
        "if (before >= wanted) return kNoTie;",
        "if (before > wanted) return kNoTie;",
        "a cut at the first slot, with none of its ties, takes as little",
    ),
    Mutant(
        "a dropped tie in the cut slot", "i < count; ++i) rest &=", "i + 1 < count; ++i) rest &="
    ),
    Mutant(
        "all ties of the cut slot are taken",
        "lowest_bits(tie_bits<Fmt>(ties, raw), cut.ties)",
        "tie_bits<Fmt>(ties, raw)",
    ),
    Mutant(
        "ties before the cut are dropped", "slot < cut.slot ? with_ties : ties.value", "ties.value"
    ),
    Mutant(
        "ties after the cut are taken",
        "slot < cut.slot ? with_ties : ties.value",
        "slot <= cut.slot + 32 ? with_ties : ties.value",
    ),
    Mutant(
        "NaNs that are too many are taken",
        "slot < cut.slot ? Fmt::kElements : slot == cut.slot ? cut.ties : 0;",
        "Fmt::kElements;",
    ),
    # write
    Mutant("bits of upper halves are lost", "return bits | bits >> 16;\n  }", "return bits;\n  }"),
    Mutant(
        "no tail mask for y",
        "    if (static_cast<int>(v * kLanes) >= limit_) return;\n    uint8_t*",
        "    uint8_t*",
    ),
    Mutant("no tail mask for bits", "if (static_cast<int>(v * kBitsBytes) < bits_limit_)", ""),
    Mutant(
        "nibbles of neighbours swapped",
        "lane % 2 == 1 ? (other >> 4)",
        "lane % 2 == 0 ? (other >> 4)",
    ),
    Mutant(
        "rows past the end are computed",
        "  if (row >= rows) return;  // never a part of a warp or of a team\n",
        "",
    ),
    Mutant("the next turn takes the same row", "    chunks.move(stride, size);\n", ""),
    Mutant(
        "the next turn keeps the old row's words",
        "  for (;;) {\n    chunks.load_held();",
        "  chunks.load_held();\n  for (;;) {",
    ),
    Mutant(
        "backward takes the even slot's nibble", "Fmt::kWide ? byte >> (4 * odd) : byte", "byte"
    ),
    Mutant(
        "backward leaves out a thread's last slot",
        "if (i * kBackwardThreads < left)\n      backward",
        "if ((i + 1) * kBackwardThreads < left)\n      backward",
    ),
    # sparse rows
    Mutant(
        "indices past k are written",
        "if (place < static_cast<uint32_t>(k))\n        to[place]",
        "to[place]",
    ),
    Mutant(
        "indices of earlier words are overwritten",
        "written += __shfl_sync",
        "written = __shfl_sync",
    ),
    Mutant(
        "no barrier before values enter the window",
        "make_uint4(0, 0, 0, 0);\n    __syncthreads();",
        "make_uint4(0, 0, 0, 0);",
    ),
    Mutant(
        "no barrier before the window is written out",
        "    __syncthreads();\n    if (aligned) {",
        "    if (aligned) {",
    ),
    Mutant(
        "no barrier before the next window",
        "to[first + i] = window[i];\n    }\n    __syncthreads();",
        "to[first + i] = window[i];\n    }",
    ),
    Mutant(
        "values of other windows are written",
        "if (at >= 0 && at < size) window",
        "if (at < size) window",
    ),
    Mutant(
        "the last rows are not counted",
        "first + kCountedRows < rows ?",
        "first + kCountedRows <= rows ?",
        "the same rows",
    ),
    # what only the PTX has
    Mutant(
        "assembly: a float32 NaN is not kept",
        "setp.gtu.f32 p, %2, %3; @p add",
        "setp.gt.f32 p, %2, %3; @p add",
        assembly=True,
    ),
    Mutant(
        "assembly: signs count in mode abs",
        "abs.f32 a, %1; set.gtu",
        "mov.f32 a, %1; set.gtu",
        assembly=True,
    ),
    Mutant(
        "assembly: ties of float32 are not equal",
        '"set.eq.f32.f32 %0, %1, %2;"',
        '"set.ne.f32.f32 %0, %1, %2;"',
        assembly=True,
    ),
    Mutant(
        "assembly: the smaller half is the larger",
        'asm("min.bf16x2',
        'asm("max.bf16x2',
        assembly=True,
    ),
)


def _first_failure(output: str) -> str:
    """Return the failing test without its parameters, and the emulation's message if it stopped."""
    stopped = re.search(r"cuda_emulation: ([^(\n]+)", output)
    failed = re.search(r"(?:FAILED|ERROR) \S*::(\w+)", output)
    crashed = re.search(r"test_\w+\.py\", line \d+ in (test_\w+)", output)
    found = failed or crashed
    name = found.group(1) if found else "the test process"
    if stopped:
        return f"{name} (emulation: {stopped.group(1).strip()})"
    return name if failed else f"{name} (crash)"


def _killer(mutated: Path, *, assembly: bool) -> str | None:
    """Return the first test that fails on the mutated sources, or None if all pass."""
    suites = SUITES[2:] if assembly else SUITES if find_nvcc() else SUITES[:2]
    for suite in suites:
        # fmt: off
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   "--no-header", "--timeout=90", "--timeout-method=thread",
                   "-k", "not spills and not 128_bit", str(HERE / suite)]
        # fmt: on
        environment = os.environ | {"TOPK_CSRC": str(mutated), **FAST_BUILD}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            return f"{suite}: {_first_failure(result.stdout + result.stderr)}"
    return None


def _mutate(mutant: Mutant, folder: Path) -> Path:
    mutated = folder / "csrc"
    shutil.rmtree(mutated, ignore_errors=True)
    shutil.copytree(CSRC, mutated)
    sources = [path for path in mutated.glob("*.cuh") if mutant.old in path.read_text()]
    if len(sources) != 1 or sources[0].read_text().count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.name!r}: its text must occur once in the kernel")
    sources[0].write_text(sources[0].read_text().replace(mutant.old, mutant.new))
    return mutated


def main() -> int:
    """Print the table and return the number of survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of mutants; default: all")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th, from I on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    survivors = 0
    print("| mutant | killed by |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen[part - 1 :: parts]:
            mutated, killer = _mutate(mutant, Path(folder)), None
            if not mutant.equivalent:
                killer = _killer(mutated, assembly=mutant.assembly)
                survivors += killer is None
            fate = f"equivalent: {mutant.equivalent}" if mutant.equivalent else "**survived**"
            print(f"| {mutant.name} | {killer or fate} |", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main())
