"""Write the whole study as one HTML file that opens from disk."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.options import positive


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "report", help="write one HTML file with claims, plots and neurons", description=__doc__
    )
    parser.add_argument("--study", type=Path, required=True, help="directory of the study")
    parser.add_argument("--output", type=Path, help="HTML file (default: STUDY/report.html)")
    parser.add_argument(
        "--run", dest="name", help="run whose neurons get cards (default: the study's subject)"
    )
    parser.add_argument(
        "--examples", type=positive, default=8, help="largest number of examples per neuron"
    )
    parser.add_argument(
        "--model", type=Path, help="exported model folder, for promoted tokens, if it has moved"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the report, and prints what it contains and what it lacks."""
    from topk_megatron.web.report import ReportConfig, write_report

    output = args.output or args.study / "report.html"
    summary = write_report(
        ReportConfig(args.study, output, args.name, args.examples, model=args.model)
    )
    neurons = len(summary["layers"]) * summary["width"]
    print(
        f"{output}: {summary['run']}, {neurons:,} neurons, {len(summary['claims'])} claims, "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )
    for reason in summary["missing"].values():
        print(f"  {reason}")
