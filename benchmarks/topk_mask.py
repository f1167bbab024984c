"""Times the operator next to torch.topk + scatter, a kthvalue threshold and copies of the tensor.

    python benchmarks/topk_mask.py                          # all tables, some minutes
    python benchmarks/topk_mask.py --hidden 2048 --k 128    # some of them
    python benchmarks/topk_mask.py --device cuda

Repeats are interleaved, so that a busy machine slows all rows of a table alike. Numbers are medians
in nanoseconds per row, and ratios are of medians within one table. On CPU, outputs are allocated
once, because the page faults of fresh memory would hide the kernel. On a GPU,
benchmarks/gpu/operator_times.py measures: rows drawn there, more baselines, more kinds of rows.

Shape suffixes: R rows, H hidden size, K selected, W words of the bitmask.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import operator_times
from topk_megatron.ops.extension import MISSING
from topk_megatron.ops.library import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"out of cache": 8 << 20, "in cache": 512 << 10}  # bytes of x; cache: L2
DEFAULT_KS = [64, 128, 256, 512]
ROW_KINDS = ("random", "relu", "mostly zero", "all equal", "quantised", "scales")


@dataclass(frozen=True)
class Setting:
    """One line of a table."""

    dtype: torch.dtype
    hidden_size: int
    k: int
    num_bytes: int
    repeats: int

    @property
    def shape_RH(self) -> tuple[int, int]:
        return self.num_bytes // (self.hidden_size * self.dtype.itemsize), self.hidden_size

    @property
    def streams(self) -> bool:
        return self.num_bytes > 4 << 20


def make_rows(kind: str, setting: Setting) -> Tensor:
    """Return rows [R, H]: random, with the mass ties that models make, or of different scales."""
    generator = torch.Generator().manual_seed(0)
    x_RH = torch.randn(setting.shape_RH, generator=generator)
    match kind:
        case "relu":
            x_RH = x_RH.relu()
        case "mostly zero":
            x_RH = (x_RH - 2).relu()
        case "all equal":
            x_RH = torch.full_like(x_RH, 1.2345)
        case "quantised":
            x_RH = (x_RH * 16).round() / 3.7
        case "scales":
            x_RH *= torch.randn((len(x_RH), 1), generator=generator).exp()
    return x_RH.to(setting.dtype)


def topk_scatter(x_RH: Tensor, k: int, y_RH: Tensor) -> None:
    """Do what a model does without the operator."""
    values_RK, indices_RK = torch.topk(x_RH, k, dim=-1, sorted=False)
    y_RH.zero_().scatter_(-1, indices_RK, values_RK)


def kthvalue_threshold(x_RH: Tensor, k: int, y_RH: Tensor) -> None:
    """Mask by the k-th value; this keeps more than k where values tie."""
    threshold_R1 = torch.kthvalue(x_RH, x_RH.shape[-1] - k + 1, dim=-1, keepdim=True).values
    torch.mul(x_RH, x_RH >= threshold_R1, out=y_RH)


def measure(work: Callable[[], object], number: int) -> float:
    """Run work a number of times, and return seconds per run."""
    start = time.perf_counter()
    for _ in range(number):
        work()
    return (time.perf_counter() - start) / number


def medians(works: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """Return nanoseconds per row of each work; runs take turns, repeatedly."""
    times: dict[str, list[float]] = {name: [] for name in works}
    number = {}
    for name, work in works.items():
        work()
        number[name] = max(1, min(200, int(0.001 / max(measure(work, 1), 1e-7))))
    for _ in range(setting.repeats):
        for name, work in works.items():
            times[name].append(measure(work, number[name]))
    num_rows = setting.shape_RH[0]
    return {name: statistics.median(values) / num_rows * 1e9 for name, values in times.items()}


def forward_work(x_RH: Tensor, k: int, y_RH: Tensor, bits_RW: Tensor) -> Callable[[], object]:
    if MISSING["cpu"] is not None:
        return lambda: OPS.topk_mask(x_RH, k, "value")
    return lambda: torch.ops.topk_megatron_internal.forward_out(x_RH, k, "value", y_RH, bits_RW)


def backward_work(dy_RH: Tensor, bits_RW: Tensor, dx_RH: Tensor) -> Callable[[], object]:
    if MISSING["cpu"] is not None:
        return lambda: OPS.topk_mask_backward(dy_RH, bits_RW)
    return lambda: torch.ops.topk_megatron_internal.backward_out(dy_RH, bits_RW, dx_RH)


def copy_work(x_RH: Tensor, y_RH: Tensor, *, stream: bool) -> Callable[[], object]:
    if stream and MISSING["cpu"] is None:
        return lambda: torch.ops.topk_megatron_internal.stream_copy(x_RH, y_RH)
    return lambda: y_RH.copy_(x_RH)


def compare(setting: Setting) -> list[str]:
    """Return one line's cells: each work in ns per row, then the ratios that have targets."""
    x_RH = make_rows("random", setting)
    y_RH, k = torch.empty_like(x_RH), setting.k
    bits_RW = OPS.topk_mask(x_RH, k, "value")[1]
    works = {
        "topk + scatter": lambda: topk_scatter(x_RH, k, y_RH),
        "kthvalue": lambda: kthvalue_threshold(x_RH, k, y_RH),
        "copy": copy_work(x_RH, y_RH, stream=False),
        "limit": copy_work(x_RH, y_RH, stream=setting.streams),
        "forward": forward_work(x_RH, k, y_RH, bits_RW),
        "backward": backward_work(x_RH, bits_RW, y_RH),
    }
    slow = {name: works.pop(name) for name in ("topk + scatter", "kthvalue")}
    ns = medians(works, setting)
    few = replace(setting, repeats=5)
    ns |= medians({**slow, "forward again": works["forward"]}, few)
    cells = [f"{ns[name]:,.0f}" for name in ("topk + scatter", "kthvalue", "copy", "limit")]
    cells += [f"{ns['forward']:,.0f}", f"{ns['backward']:,.0f}"]
    cells.append(f"{ns['topk + scatter'] / ns['forward again']:.1f}")
    return [*cells, *(f"{ns[name] / ns['limit']:.2f}" for name in ("forward", "backward"))]


def compare_kinds(setting: Setting) -> list[str]:
    """Return one line's cells: rows of other kinds relative to random ones."""
    rows = {kind: make_rows(kind, setting) for kind in ROW_KINDS}
    y_RH = torch.empty_like(rows["random"])
    bits_RW = OPS.topk_mask(rows["random"], setting.k, "value")[1]
    works = {kind: forward_work(x_RH, setting.k, y_RH, bits_RW) for kind, x_RH in rows.items()}
    ns = medians(works, setting)
    return [f"{ns[kind] / ns['random']:.2f}" for kind in ROW_KINDS[1:]]


def describe_machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    capability = torch.backends.cpu.get_cpu_capability()
    kernel = "the reference" if MISSING["cpu"] is not None else "the kernel"
    return (
        f"{name}, {torch.get_num_threads()} thread(s), CPU capability {capability}; torch"
        f" {torch.__version__}, Python {platform.python_version()}; topk_mask is {kernel}"
    )


def print_table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def run(options: argparse.Namespace) -> None:
    columns = ["H", "k", "topk + scatter", "kthvalue", "copy", "limit", "forward", "backward"]
    columns += ["faster than topk", "forward / limit", "backward / limit"]
    kind_columns = ["H", "k", *(f"{kind} / random" for kind in ROW_KINDS[1:])]
    print(f"\n## {describe_machine()}")
    for name, dtype in DTYPES.items():
        for place, num_bytes in SIZES.items():
            settings = [
                Setting(dtype, hidden_size, k, num_bytes, options.repeats)
                for hidden_size in options.hidden
                for k in options.k
                if k < hidden_size
            ]
            heads = [[str(s.hidden_size), str(s.k)] for s in settings]
            megabytes = f"{num_bytes / (1 << 20):g} MiB"
            rows = [head + compare(s) for head, s in zip(heads, settings, strict=True)]
            print_table(f"{name}, {place} ({megabytes}), ns per row", columns, rows)
            rows = [head + compare_kinds(s) for head, s in zip(heads, settings, strict=True)]
            print_table(f"{name}, {place}: other kinds of rows", kind_columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--hidden", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="row lengths H")
    add(
        "--k",
        type=int,
        nargs="+",
        help="selected per row (default: 64 128 256 512; on cuda H / 32, H / 16, H / 8)",
    )
    add(
        "--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one run for each value"
    )
    add("--repeats", type=int, default=31, help="timed repeats of each work (cpu)")
    add("--seconds", type=float, default=600, help="when to start no further case (cuda)")
    add("--output", type=Path, help="JSON file of the times (cuda)")
    options = parser.parse_args()
    if options.device == "cuda":
        operator_times.run(options)
        return
    options.k = options.k or DEFAULT_KS
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        run(options)


if __name__ == "__main__":
    main()
