"""Turns the folder of a GPU check into tables for benchmarks/results/, and prints the summary.

    python -m benchmarks.gpu.tables runs/gpu_check/2026-11-28

Writes gpu_operator.md, gpu_train_step.md, gpu_checks.md and summary.md into the folder. A step that
did not run, or whose numbers are missing, is a line that says so.
"""

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.predictions import judge, read_predictions

PUBLISHED = (
    "Other people's numbers, for orientation: Transformer Engine's router kernel moved 964 GB/s"
    " forward and 2,766 GB/s backward on a B300 (its pull request 3012); CCCL's batched top-k took"
    " 0.887 ms for 2^28 float32 in rows of 1024 at k = 32 (its pull request 11060).\n"
)
WORKS = ("forward", "backward", "pack", "unpack")


@dataclass(frozen=True)
class Step:
    """A line of steps.tsv."""

    name: str
    status: str
    seconds: str
    bound: str


class Results:
    """The files of one check."""

    def __init__(self, folder: Path) -> None:
        """Read the steps and every JSON file that is there."""
        self.folder = folder
        self.steps: list[Step] = []
        if (folder / "steps.tsv").exists():
            with (folder / "steps.tsv").open(newline="") as file:
                self.steps = [Step(*row[:4]) for row in csv.reader(file, delimiter="\t")]
        self.facts = {path.stem: self._read(path) for path in sorted(folder.glob("*.json"))}

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text())
        except ValueError:  # a step that was stopped while writing
            return {"headline": f"{path.name} is incomplete"}

    def headline(self, step: Step) -> str:
        """Return the number that a step is about, or the last line of its log."""
        written = self.facts.get(step.name, {}).get("headline")
        if written and not (step.status.startswith("failed") and "DIFFERENT" not in written):
            return written
        log = self.folder / f"{step.name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def table(columns: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [columns, ["---"] * len(columns), *safe]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def number(value: Any, form: str = ",.0f") -> str:
    """Format a number; a missing one is a dash."""
    return "—" if value is None else format(value, form)


def preamble(results: Results) -> str:
    """Return the machine of every table: card, driver, versions, clocks, date and command."""
    machine = results.facts.get("machine", {})
    card, packages = machine.get("card", {}), machine.get("packages", {})
    device = machine.get("torch_device", {})
    name = card.get("name") or device.get("name") or "no card was read"
    clocks = ", ".join(
        f"{label} {card[key]}"
        for label, key in (
            ("SM", "clocks.sm"),
            ("memory", "clocks.mem"),
            ("SM at most", "clocks.max.sm"),
        )
        if key in card
    )
    return (
        f"{machine.get('date', 'no date')}; {name}, driver {card.get('driver_version', 'unknown')};"
        f" torch {packages.get('torch')}, CUDA {machine.get('cuda')}, triton"
        f" {packages.get('triton')}; clocks as read before the run: {clocks or 'not read'}; commit"
        f" {machine.get('commit') or 'unknown'}. From `{machine.get('command', '')}`.\n"
    )


def share(line: dict[str, Any], work: str) -> str:
    """Return a work's ns per row with its percentiles, and its share of the copy's bandwidth."""
    found = line.get(work)
    if found is None:
        return "—"
    spread = f"{found['median']:,.1f} [{found['p10']:,.1f}, {found['p90']:,.1f}]"
    return f"{spread}, {found['share_of_copy']:.0%}" if "share_of_copy" in found else spread


def operator_page(results: Results) -> str:
    """Return gpu_operator.md."""
    facts = results.facts.get("operator", {})
    parts = ["# topk_mask on a GPU\n", preamble(results)]
    parts.append(
        "ns per row as median [10th, 90th percentile] of repeats that take turns, and the share of"
        " the copy's bandwidth at ideal bytes. Buffers rotate, so that the L2 cache does not help."
        f" {facts.get('left_out', 'All')} cases were left out for time.\n"
    )
    for title, lines in facts.get("tables", {}).items():
        parts.append(f"## {title}\n")
        if title == "baselines":
            parts += [*(baseline_table(line) for line in lines), PUBLISHED]
        else:
            parts.append(case_table(lines))
    if "tables" not in facts:
        parts.append("The operator was not timed.\n")
    parts += ["## Hardware counters\n", counter_table(results.facts.get("counters", {}))]
    parts += ["## Sparse transport in one process\n", transport_table(results)]
    return "\n".join(parts)


def case_table(lines: list[dict[str, Any]]) -> str:
    """Return the table of the operator's own works."""
    columns = ["dtype", "H", "k", "mode", "kind of rows", "copy TB/s", "copy", *WORKS]
    return table(
        columns,
        [
            [
                *(x["dtype"], str(x["hidden_size"]), str(x["k"]), x["mode"], x["kind"]),
                f"{x['copy_tb_s']:.2f}",
                *(share(x, work) for work in ("copy", *WORKS)),
            ]
            for x in lines
        ],
    )


def baseline_table(line: dict[str, Any]) -> str:
    """Return the table of all baselines in one case."""
    ours = line["forward"]["median"]
    lines = [
        ["topk_mask forward", "y and a bitmask", share(line, "forward"), "1.00", ""],
        ["topk_mask backward", "dx", share(line, "backward"), "", ""],
        ["copy", "", share(line, "copy"), "", ""],
    ]
    for name, remark in line["remarks"].items():
        times = f"{line[name]['median'] / ours:.2f}" if name in line else ""
        lines.append([name, line["jobs"][name], share(line, name), times, remark])
    heading = f"{line['dtype']}, H = {line['hidden_size']}, k = {line['k']}:\n\n"
    columns = ["what", "writes", "ns per row", "times forward", "remark"]
    return heading + table(columns, lines)


def counter_table(facts: dict[str, Any]) -> str:
    """Return what ncu counted."""
    if "works" not in facts:
        return "No counters were read.\n"
    names = ("dram", "issue", "occupancy", "alu", "fma", "fp16", "lsu", "xu", "uniform")
    columns = ["work", "kernels", "us", "bytes / ideal", *(f"{name} %" for name in names)]
    lines = [
        [
            *(w["work"], str(w["kernels"]), number(w["ns"] / 1e3, ",.1f")),
            number(w.get("bytes_over_ideal"), ".3f"),
            *(number(w.get(f"{name}_pct"), ".1f") for name in names),
        ]
        for w in facts["works"]
    ]
    unknown = ", ".join(facts.get("unknown_metrics", []))
    return table(columns, lines) + (f"\nThis ncu does not know {unknown}.\n" if unknown else "")


def transport_table(results: Results) -> str:
    """Return the times of the transport's parts."""
    shapes = results.facts.get("transport", {}).get("shapes")
    if not shapes:
        return "The transport was not run.\n"
    names = list(shapes[0]["us"])
    columns = ["H", "k", "rows", "bytes / dense", "bitwise equal", *(f"{n}, us" for n in names)]
    lines = [
        [
            *(str(x[key]) for key in ("hidden_size", "k", "rows")),
            f"{x['message_bytes'] / x['dense_bytes']:.3f}",
            "yes" if x["equal"] else "NO",
            *(number(x["us"][name], ",.1f") for name in names),
        ]
        for x in shapes
    ]
    return table(columns, lines)


def train_page(results: Results) -> str:
    """Return gpu_train_step.md."""
    facts = results.facts.get("train_step", {})
    parts = ["# A TopK training step on a GPU\n", preamble(results)]
    if "variants" in facts:
        shape = ", ".join(f"{key} {value}" for key, value in facts["sizes"].items())
        parts.append(f"{shape}; attention {facts['attention']}; {facts['rounds']} rounds.\n")
        columns = ["step", "ms", "p10", "p90", "tokens/s", "peak GiB above weights", "loss"]
        lines = [
            [
                name,
                *(number(v[key], ".2f") for key in ("ms", "p10_ms", "p90_ms")),
                number(v["tokens_per_second"]),
                number(v["peak_gib_above_weights"], ".2f"),
                number(v["loss"], ".4f"),
            ]
            for name, v in facts["variants"].items()
        ]
        parts.append(table(columns, lines))
        pairs = [
            [
                f"{d['of']} over {d['over']}",
                f"{d['mean']:+.2%}",
                f"[{d['interval'][0]:+.2%}, {d['interval'][1]:+.2%}]",
            ]
            for d in facts["differences"]
        ]
        parts.append(table(["paired difference", "mean", "95 % bootstrap interval"], pairs))
    else:
        parts.append("The training step was not timed.\n")
    for name, title in (("pretrain", "pretrain_topk_gpt.py, mock data"), ("training", "Real text")):
        parts += [f"## {title}\n", pretrain_table(results.facts.get(name, {}))]
    return "\n".join(parts)


def pretrain_table(facts: dict[str, Any]) -> str:
    """Return steps, speed and losses of real runs."""
    if "runs" not in facts:
        return "It was not run.\n"
    columns = ["variant", "steps", "ms per step", "tokens/s", "first loss", "last loss"]
    lines = [
        [
            *(name, str(x["steps"]), number(x["step_ms"], ",.1f")),
            number(x["tokens_per_second"]),
            *(number(x["losses"][end][1], ".4f") for end in (0, -1)),
        ]
        for name, x in facts["runs"].items()
    ]
    said = sorted({line for x in facts["runs"].values() for line in x["announced"]})
    return table(columns, lines) + "".join(f"\n    {line}" for line in said) + "\n"


def checks_page(results: Results) -> str:
    """Return gpu_checks.md: the steps, and the predictions beside what was measured."""
    judged = [
        [p.what, p.text, number(value, ".4g"), verdict, p.reason]
        for p, value, verdict in judge(read_predictions(), results.facts, results.steps)
    ]
    columns = ["what", "predicted", "measured", "held", "why it was predicted"]
    return "\n".join(
        [
            "# The checks of a GPU run\n",
            preamble(results),
            steps_table(results),
            "## Predictions\n",
            table(columns, judged),
        ]
    )


def steps_table(results: Results) -> str:
    """Return the summary: step, status, seconds, headline."""
    lines = [
        [step.name, step.status, f"{step.seconds} of {step.bound}", results.headline(step)]
        for step in results.steps
    ]
    return table(["step", "status", "seconds", "headline"], lines)


PAGES: dict[str, Callable[[Results], str]] = {
    "gpu_operator.md": operator_page,
    "gpu_train_step.md": train_page,
    "gpu_checks.md": checks_page,
    "summary.md": steps_table,
}


def main() -> None:
    """Write the pages, and print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="results of scripts/gpu_check.sh")
    results = Results(parser.parse_args().folder)
    for name, page in PAGES.items():
        (results.folder / name).write_text(page(results))
    print(steps_table(results))


if __name__ == "__main__":
    main()
