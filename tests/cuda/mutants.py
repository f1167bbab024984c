"""Seeds faults into the CUDA kernel, one at a time, and shows which test notices each.

    python tests/cuda/mutants.py [name ...]

Every mutant is a textual change of a `.cuh` file. It faces `test_cuda_source.py` first and, if that
passes and nvcc is on PATH, `test_cuda_ptx.py`. The script prints a Markdown table; its exit
status is the number of survivors. benchmarks/results/topk_mask_mutants.md holds the results.
"""

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
FAST_BUILD = {"TOPK_EMULATION_OPTIMISATION": "-O0"}  # most mutants die young
SUITES = ("test_cuda_source.py", "test_cuda_ptx.py")


@dataclass(frozen=True)
class Mutant:
    """One fault: replaces `old`, which occurs once in the kernel, by `new`.

    Attributes:
        name: what the fault is.
        old: the text to replace.
        new: the text to put there.
        equivalent: why no test can notice the fault; empty if one can.
    """

    name: str
    old: str
    new: str
    equivalent: str = ""


# fmt: off
MUTANTS = (
    # barriers
    Mutant("no barrier between warps' exchange and its reads",
           "    __syncthreads();\n    return lane < warps", "    return lane < warps"),
    Mutant("one exchange buffer instead of two", "    turn_ ^= 1;\n", ""),
    Mutant("no barrier between packing the list and reading it",
           "  team.sync();\n  const uint32_t size =", "  const uint32_t size ="),
    Mutant("no barrier after the first warp publishes the threshold",
           "    sync();\n    return {control_[kThreshold]", "    return {control_[kThreshold]"),
    Mutant("no __syncwarp where one warp has the row", "      __syncwarp();\n", "      ;\n"),
    Mutant("list sizes are not cleared", "  team.clear_scalars();\n", ""),
    # keys
    Mutant("float32 keys not rotated (negative NaNs become small)",
           "(word, negative, kSign) - kRotation", "(word, negative, kSign)"),
    Mutant("16-bit keys borrow across halves",
           "return logic3<kA ^ (kB & kC)>(lent, word, kTops);",
           "return logic3<kA ^ (kB | kC)>(word, negative, kTops) - kRotation * 0x10001u;"),
    Mutant("NaNs are not one class (first)",
           "container_of(key >= kFirstNan ? kFirstNan : key == kZero", "container_of(key == kZero"),
    Mutant("NaNs are not one class (last)",
           "key >= kFirstNan ? 0xffffffffu", "false ? 0xffffffffu"),
    Mutant("infinity counts as NaN", "kInfinity - kRotation + 1;", "kInfinity - kRotation;"),
    Mutant("-0 is smaller than +0 (first)", "key == kZero ? kMinusZero : key", "key"),
    Mutant("-0 is smaller than +0 (last)", "key == kMinusZero ? kZero : key", "key"),
    Mutant("mode abs compares signs",
           "return and_again(word, kWide ? 0x7fffffffu : 0x7fff7fffu);", "return word;"),
    Mutant("pads are zeros", "kAbs ? 0 : kSign | kInfinity;", "0;"),
    # threshold
    Mutant("quota rounded down",
           "quota = (k + team.warps - 1) / team.warps;",
           "quota = k < team.warps ? 1 : k / team.warps;"),
    Mutant("largest floor instead of smallest", "team.min(quota <=", "team.max(quota <="),
    Mutant("floor above the quota-th maximum",
           "if (count >= quota) {", "if (2 * count >= quota) {"),
    Mutant("one tie too few at the floor",
           "floor_last, k - found};", "floor_last, k - found - 1};"),
    Mutant("off by one: found < k", "if (found <= k) return", "if (found < k) return",
           "k candidates: the list's threshold selects just them, too"),
    Mutant("off by one: count > k in the list",
           "{bound, 0xffffffffu, kAllTies};\n    if (count >= k) {",
           "{bound, 0xffffffffu, kAllTies};\n    if (count > k) {",
           "count is k here only inside a class, and the class is what counts"),
    Mutant("off by two: count > k + 1 in the list",
           "{bound, 0xffffffffu, kAllTies};\n    if (count >= k) {",
           "{bound, 0xffffffffu, kAllTies};\n    if (count > k + 1) {"),
    Mutant("bisection ends inside a class", "if (count == k && bound == Fmt::class_first(middle))",
           "if (count == k)"),
    Mutant("all ties although some must go", "return {first, last, all ? kAllTies : k - above};",
           "return {first, last, kAllTies};"),
    Mutant("elements above the window are forgotten", "      above = count;\n", ""),
    Mutant("window ends one key early",
           "window.high - window.low) | Fmt::kBelow;",
           "window.high - window.low - 1) | Fmt::kBelow;"),
    Mutant("list overflow is not checked", "if (base + of_warp <= kListCapacity) {", "{"),
    Mutant("no exact fallback for long lists", "if (found <= kListCapacity) {", "if (true) {"),
    Mutant("window left too wide for the list",
           "while (reached - above > kListCapacity) {", "while (reached - above > k + 600) {"),
    Mutant("column overflow is not checked", "if (size() < capacity) first_", "first_"),
    Mutant("column overflow is not reported", "if (lost) of_warp = kLost;", ""),
    # ties
    Mutant("cut one lane late", "up_to_here >= wanted", "up_to_here > wanted"),
    Mutant("cut one chunk late", "if (passed < ties) {", "if (passed <= ties) {",
           "the later chunk's first slot becomes the cut, with no tie of its own taken"),
    Mutant("cut one chunk early", "if (passed < ties) {", "if (passed + of_chunk < ties) {"),
    Mutant("warps before this one are not counted", "threshold.ties - before, team.lane",
           "threshold.ties, team.lane"),
    Mutant("other warps' pads count as ties", "chunks_.owns(v) ? count_ties", "true ? count_ties"),
    Mutant("a dropped tie in the cut slot", "(tie && ties > 0)) bits", "(tie && ties > 1)) bits"),
    Mutant("ties before the cut are dropped",
           "cut.slot ? threshold.first - 1 :", "cut.slot ? threshold.first :"),
    Mutant("a bound below key 0 wraps around", "threshold.first == 0 ? 0 : cut.slot", "cut.slot"),
    # write
    Mutant("flipped comparison of 16-bit keys", "(kA & ~kB) | (kA & ~kC) | (~kB & ~kC);",
           "(kA & kB) | (kA & ~kC) | (kB & ~kC);"),
    Mutant("no tail mask for y",
           "    if (static_cast<int>(v * kLanes) >= limit_) return;\n    uint8_t*", "    uint8_t*"),
    Mutant("no tail mask for bits", "if (static_cast<int>(v * kBitsBytes) < bits_limit_)", ""),
    Mutant("nibbles of neighbours swapped",
           "lane % 2 == 1 ? (other >> 4)", "lane % 2 == 0 ? (other >> 4)"),
    Mutant("rows past the end are computed",
           "  if (row >= rows) return;  // never a part of a warp or of a team\n", ""),
    Mutant("backward takes the even slot's nibble", ">> (slot % 2 * 4)", ">> 0"),
    # what only the PTX has
    Mutant("assembly: candidates at the floor", "setp.gt.u32 p, %1, %2; @p st.shared",
           "setp.ge.u32 p, %1, %2; @p st.shared"),
    Mutant("assembly: kept at the bound", "setp.gt.u32 p, %2, %3; @p or.b32",
           "setp.ge.u32 p, %2, %3; @p or.b32"),
    Mutant("assembly: columns overlap",
           "setp.le.u32 p, %2, %3; @p st.shared.u32 [%0], %1; @p add.u32 %0, %0, 128;",
           "setp.le.u32 p, %2, %3; @p st.shared.u32 [%0], %1; @p add.u32 %0, %0, 64;"),
)
# fmt: on


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


def _killer(mutated: Path) -> str | None:
    """Return the first test that fails on the mutated sources, or None if all pass."""
    suites = SUITES if find_nvcc() else SUITES[:1]
    for suite in suites:
        # fmt: off
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   "--no-header", "--timeout=300", "-k", "not spills and not 128_bit",
                   str(HERE / suite)]
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


def main(names: list[str]) -> int:
    """Print the table and return the number of survivors."""
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    survivors = 0
    print("| mutant | killed by |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            killer = _killer(_mutate(mutant, Path(folder)))
            survivors += killer is None and not mutant.equivalent
            fate = f"equivalent: {mutant.equivalent}" if mutant.equivalent else "**survived**"
            print(f"| {mutant.name} | {killer or fate} |", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
