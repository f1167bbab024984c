"""Times of the operator on a GPU, next to a copy of the same tensors and to every baseline.

`python benchmarks/topk_mask.py --device cuda` runs this. Rows are drawn on the device. "Ideal"
bytes are those that a perfect kernel moves: x read, y and the bits written. A share of the copy's
bandwidth is ideal bytes per second over the copy's bytes per second, both of the same call.

Shape suffixes: R rows, H hidden size.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.baselines import BASELINES, distinct_rows, find
from benchmarks.gpu.timing import Times, Work, measure
from tests.rows import KINDS, make_rows
from topk_megatron.ops import pack_sparse, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.extension import MISSING
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import index_dtype, num_words

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DEVICE = "cuda"
SET_BYTES = 128 << 20  # of x, in each buffer set
SETS = 4
REPEATS = 31
BASELINE_REPEATS = 7


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    dtype: str
    hidden_size: int
    k: int
    mode: str = "value"
    kind: str = "normal"

    @property
    def rows(self) -> int:
        """Number of rows of one buffer set."""
        return max(1, SET_BYTES // (self.hidden_size * DTYPES[self.dtype].itemsize))

    def draw(self, seed: int) -> Tensor:
        """Draw one set of rows [R, H] on the device."""
        shape = (self.rows, self.hidden_size)
        return make_rows(self.kind, shape, DTYPES[self.dtype], seed, DEVICE)


def ideal_bytes(case: Case) -> dict[str, int]:
    """Return the bytes per row that each work has to move at least.

    The gradient counts as read in full; a kernel that reads only what is selected can be faster
    than this ideal.
    """
    item, words = DTYPES[case.dtype].itemsize, 4 * num_words(case.hidden_size)
    dense = case.hidden_size * item
    sparse = case.k * (item + index_dtype(case.hidden_size).itemsize)
    return {
        "copy": 2 * dense,
        "forward": 2 * dense + words,
        "backward": 2 * dense + words,
        "pack": case.k * item + words + sparse,
        "unpack": sparse + dense,
    }


def works_of(case: Case, sets: int) -> dict[str, Work]:
    """Return the copy and the operator's own works, over sets of rows."""
    xs = [case.draw(seed) for seed in range(sets)]
    ys = [torch.empty_like(x) for x in xs]
    selected = [topk_mask_with_bits(x, case.k, mode=case.mode) for x in xs]
    packed = [pack_sparse(y, bits, case.k) for y, bits in selected]
    return {
        "copy": lambda n: ys[n].copy_(xs[n]),
        "forward": lambda n: OPS.topk_mask(xs[n], case.k, case.mode),
        "backward": lambda n: OPS.topk_mask_backward(xs[n], selected[n][1]),
        "pack": lambda n: pack_sparse(*selected[n], case.k),
        "unpack": lambda n: unpack_sparse(*packed[n], case.hidden_size),
    }


def line(case: Case, times: dict[str, Times]) -> dict[str, Any]:
    """Return a table's line: for each work, ns per row and its share of the copy's bandwidth."""
    ideal = ideal_bytes(case)
    copy_rate = ideal["copy"] * case.rows / times["copy"].median
    found: dict[str, Any] = {**asdict(case), "rows": case.rows, "copy_tb_s": copy_rate / 1e12}
    for name, found_times in times.items():
        found[name] = {key: s / case.rows * 1e9 for key, s in asdict(found_times).items()}
        if name in ideal:
            rate = ideal[name] * case.rows / found_times.median
            found[name]["share_of_copy"] = rate / copy_rate
    return found


def operator_line(case: Case) -> dict[str, Any]:
    """Time the operator's works in one case."""
    return line(case, measure(works_of(case, SETS), sets=SETS, repeats=REPEATS))


def baseline_lines(case: Case) -> dict[str, Any]:
    """Time every baseline that runs in one case, beside the copy and the forward pass."""
    x_RH = distinct_rows(64, case.hidden_size, DTYPES[case.dtype], DEVICE)
    functions, remarks = find(x_RH, case.k)
    sets = 2
    works = works_of(case, sets)
    xs = [case.draw(seed) for seed in range(sets)]
    chosen: dict[str, Work] = {name: works[name] for name in ("copy", "forward", "backward")}
    for name, function in functions.items():
        try:
            function(xs[0], case.k)
        except Exception as problem:  # too large for it, though the few rows of `find` were not
            remarks[name] = f"absent: fails on {case.rows:,} rows: {type(problem).__name__}"
        else:
            chosen[name] = lambda n, f=function: f(xs[n], case.k)
    found = line(case, measure(chosen, sets=sets, repeats=BASELINE_REPEATS))
    jobs = {baseline.name: baseline.job for baseline in BASELINES}
    return found | {"remarks": remarks, "jobs": jobs}


def plan(options: argparse.Namespace) -> dict[str, list[Case]]:
    """Return the cases of each table, the most important first."""
    widths, shares = options.hidden, (32, 16, 8)
    shapes = [(h, k) for h in widths for k in options.k or [h // share for share in shares]]
    shapes = [(h, k) for h, k in shapes if 1 <= k < h]
    kinds = [Case(d, 4096, 256, kind=kind) for d in ("bfloat16", "float32") for kind in KINDS]
    modes = [Case(d, h, h // 16, "abs") for d in DTYPES for h in (2048, 4096, 8192)]
    odd = [Case(d, h, h // 16) for d in ("bfloat16", "float32") for h in (2049, 5000)]
    return {
        "sizes": [Case(dtype, *shape) for dtype in ("bfloat16", "float32") for shape in shapes],
        "kinds": kinds,
        # Code of others, which could leave the device in an error, comes after what matters more.
        "baselines": [Case("bfloat16", 4096, 256), Case("float32", 1024, 32)],
        "float16, mode abs and odd H": [Case("float16", h, h // 16) for h in widths] + modes + odd,
    }


def run(options: argparse.Namespace) -> None:
    """Measure until done or until the seconds are used up, and write what was measured."""
    if not torch.cuda.is_available() or MISSING["cuda"] is not None:
        reason = MISSING["cuda"] if torch.cuda.is_available() else "torch finds no CUDA device"
        raise SystemExit(f"error: --device cuda needs a GPU and the kernel: {reason}")
    started, results, left_out = time.monotonic(), {}, 0
    for title, cases in plan(options).items():
        results[title] = []
        for case in cases:
            if time.monotonic() - started > options.seconds:
                left_out += 1
                continue
            results[title].append((baseline_lines if title == "baselines" else operator_line)(case))
            torch.cuda.empty_cache()
            print(title, case, flush=True)
            write(options.output, results, left_out)
    write(options.output, results, left_out)
    print(headline(results, left_out))


def headline(results: dict[str, list[dict[str, Any]]], left_out: int) -> str:
    """Return the shares of the case that the project cares about most."""
    rows = [r for r in results.get("sizes", []) if r["dtype"] == "bfloat16"]
    best = next((r for r in rows if (r["hidden_size"], r["k"]) == (4096, 256)), None)
    if best is None:
        return "bfloat16 H = 4096, k = 256 was not measured"
    works = ("forward", "backward", "pack", "unpack")
    shares = ", ".join(f"{work} {best[work]['share_of_copy']:.0%}" for work in works)
    more = f"; {left_out} cases left out for time" if left_out else ""
    return f"bfloat16 H = 4096, k = 256, of the copy's {best['copy_tb_s']:.2f} TB/s: {shares}{more}"


def write(output: Path | None, results: dict[str, Any], left_out: int) -> None:
    """Write everything measured so far, in case the process is stopped."""
    if output is not None:
        facts = {"headline": headline(results, left_out), "left_out": left_out, "tables": results}
        facts["conditions"] = {"set_bytes": SET_BYTES, "sets": SETS, "repeats": REPEATS}
        output.write_text(json.dumps(facts, indent=1))
