"""analyze sae: train TopK SAEs on a dense model as the baseline, and measure their stability."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.options import (
    add_corpus_arguments,
    add_mean_arguments,
    add_record_arguments,
    add_study_argument,
    positive,
    record_config,
)


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "sae", help="train TopK SAEs on the dense twin and match them", description=__doc__
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    add_study_argument(parser)
    parser.add_argument("--name", default="sae", help="runs are called NAME-seed-S (default: sae)")
    add_corpus_arguments(parser)
    parser.add_argument("--train-documents", metavar="A:B", help="documents to train on")
    parser.add_argument("--layers", help="layers (default: all but the last two)")
    parser.add_argument("--k", type=positive, required=True, help="latents to keep per token")
    parser.add_argument("--width", type=positive, help="latents (default: the hidden size)")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1], help="two different seeds")
    parser.add_argument(
        "--train-tokens", type=positive, default=500_000, help="hidden states seen in training"
    )
    parser.add_argument(
        "--stored-tokens", type=positive, default=200_000, help="hidden states held in memory"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument(
        "--checkpoints",
        nargs=2,
        metavar="RUN",
        help="two runs of a TopK LM to match in the same way",
    )
    add_record_arguments(parser)
    parser.add_argument("--threshold", type=float, default=0.7, help="least affinity of a match")
    add_mean_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train what is not there, record both seeds, match, write, and print the shares."""
    from topk_megatron.analysis.result import write_result
    from topk_megatron.analysis.sae.results import MatchConfig, sae
    from topk_megatron.analysis.sae.run import baseline
    from topk_megatron.analysis.study import open_runs
    from topk_megatron.errors import AnalysisError

    if len(set(args.seeds)) != 2:
        raise AnalysisError("--seeds needs two different seeds")
    comparisons = {}
    if args.checkpoints:
        one, other = open_runs(args.study, args.checkpoints)
        comparisons["topk_checkpoints"] = (one, other)
    comparisons["sae_seeds"], decoders, facts = baseline(args, record_config(args))
    config = MatchConfig(
        min_count=args.min_count, threshold=args.threshold, bootstrap=args.bootstrap
    )
    result = sae(config, comparisons, decoders, facts)
    write_result(args.study, "sae", result)
    for row in (row for entry in result.claims for row in entry["rows"]):
        if row["value"] is not None:
            print(f"{row['name']}: {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
