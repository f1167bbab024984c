"""Reads the hardware counters of six launches by Nsight Compute, and compares bytes with the ideal.

    python -m benchmarks.gpu.counters --output counters.json

ncu runs `benchmarks.gpu.launches profile` without touching the clocks. A launch of the marker
kernel begins each work; the kernels up to the next one belong to it. Percentages of several kernels
are means weighted by time. A counter that this ncu does not know is left out and named.
"""

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MARKER = "erfinv"
PIPES = ("alu", "fma", "fp16", "lsu", "xu", "uniform")
TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
PERCENTAGES = {
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    **{p: f"sm__inst_executed_pipe_{p}.avg.pct_of_peak_sustained_active" for p in PIPES},
}
INSTRUCTIONS = {p: f"sm__inst_executed_pipe_{p}.sum" for p in PIPES}
METRICS = (TIME, READ, WRITTEN, *PERCENTAGES.values(), *INSTRUCTIONS.values())


def read_rows(text: str) -> list[dict[str, str]]:
    """Return the launches in ncu's raw CSV page, without the row of units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]  # among other messages
    if not lines or not lines[0].startswith('"ID"'):
        raise SystemExit("error: ncu printed no table; the log has its messages")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    return [row for row in rows if (row.get("ID") or "").isdigit()]


def number(row: dict[str, str], metric: str) -> float | None:
    """Return a counter of one launch, or None if it was not collected."""
    value = (row.get(metric) or "").replace(",", "")
    try:
        return float(value)
    except ValueError:
        return None


def by_work(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Split launches at the marker kernels."""
    works: list[list[dict[str, str]]] = []
    for row in rows:
        if MARKER in row["Kernel Name"]:
            works.append([])
        elif works:
            works[-1].append(row)
    return works


def summarise(label: str, ideal: int, launches: list[dict[str, str]]) -> dict[str, Any]:
    """Return the counters of one work."""
    times = [number(row, TIME) or 0.0 for row in launches]  # nanoseconds, by --print-units base
    total = sum(times)
    found: dict[str, Any] = {"work": label, "kernels": len(launches), "ns": total, "ideal": ideal}
    moved = [number(row, metric) for row in launches for metric in (READ, WRITTEN)]
    if launches and None not in moved:
        found["bytes"] = sum(value or 0.0 for value in moved)
        found["bytes_over_ideal"] = found["bytes"] / ideal
    for name, metric in PERCENTAGES.items():
        values = [number(row, metric) for row in launches]
        if total and None not in values:
            weighted = [(v or 0.0) * t for v, t in zip(values, times, strict=True)]
            found[f"{name}_pct"] = sum(weighted) / total
    for name, metric in INSTRUCTIONS.items():
        values = [number(row, metric) for row in launches]
        if launches and None not in values:
            found[f"{name}_instructions"] = sum(value or 0.0 for value in values)
    return found


def parse(text: str) -> list[dict[str, Any]]:
    """Turn ncu's output, with the program's LAUNCH lines in it, into one entry per work."""
    lines = [line.split("\t") for line in text.splitlines() if line.startswith("LAUNCH\t")]
    works = by_work(read_rows(text))
    if len(lines) != len(works):
        raise SystemExit(f"error: {len(lines)} works were launched, and ncu shows {len(works)}")
    return [summarise(x[2], int(x[3]), rows) for x, rows in zip(lines, works, strict=True)]


def profile(log: Path | None) -> tuple[str, list[str]]:
    """Run ncu, without the counters that it does not know; return its output and their names."""
    metrics, unknown = list(METRICS), []
    while True:
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
        command += ["--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics)]
        command += [sys.executable, "-m", "benchmarks.gpu.launches", "profile"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        if log is not None:
            log.write_text(output)
        errors = "\n".join(line for line in output.splitlines() if "==ERROR==" in line)
        missing = [name for name in metrics if name in errors]
        if not missing:
            if done.returncode != 0:
                raise SystemExit(
                    f"error: ncu ended with status {done.returncode}\n{output[-2000:]}"
                )
            return done.stdout, unknown
        unknown += missing
        metrics = [name for name in metrics if name not in missing]


def headline(works: list[dict[str, Any]]) -> str:
    """Return the forward pass of the model that the project cares about most."""
    best = next((w for w in works if w["work"].startswith("forward bfloat16 H = 4096")), None)
    if best is None or "bytes_over_ideal" not in best:
        return "no bytes were counted"
    pipes = max(PIPES, key=lambda pipe: best.get(f"{pipe}_pct", 0))
    return (
        f"{best['work']}: {best['bytes_over_ideal']:.2f} of the ideal bytes, memory at"
        f" {best.get('dram_pct', 0):.0f} %, busiest pipe {pipes} at"
        f" {best.get(f'{pipes}_pct', 0):.0f} %"
    )


def main() -> None:
    """Profile, and write the counters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--raw", type=Path, help="file for ncu's own output")
    options = parser.parse_args()
    if shutil.which("ncu") is None:
        raise SystemExit("error: ncu (Nsight Compute) is not on this machine's PATH")
    text, unknown = profile(options.raw)
    works = parse(text)
    facts = {"headline": headline(works), "works": works, "unknown_metrics": unknown}
    options.output.write_text(json.dumps(facts, indent=1))
    print(facts["headline"])


if __name__ == "__main__":
    main()
