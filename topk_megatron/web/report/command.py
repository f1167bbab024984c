"""analyze report: the whole study as one HTML file that opens from disk."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.arguments import positive


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report", help="one HTML file with claims, plots and neurons", description=__doc__
    )
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")
    parser.add_argument("--output", type=Path, help="HTML file (default: STUDY/report.html)")
    parser.add_argument("--run", dest="name", help="whose neurons get cards (default: the subject)")
    parser.add_argument("--examples", type=positive, default=8, help="of each neuron, at most")
    parser.add_argument(
        "--model", type=Path, help="its folder, for promoted tokens, if it has moved since"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write it, and say what it holds and what it lacks."""
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
