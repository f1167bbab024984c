"""analyze sae: TopK SAEs on a dense model, as the baseline, and how stable their latents are."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.arguments import positive
from topk_megatron.analysis.record.command import (
    add_corpus_arguments,
    add_record_arguments,
    record_config,
)


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "sae", help="train TopK SAEs on the dense twin and match them", description=__doc__
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")
    parser.add_argument("--name", default="sae", help="runs are called NAME-seed-S (default: sae)")
    add_corpus_arguments(parser)
    parser.add_argument("--train-documents", metavar="A:B", help="documents to train on")
    parser.add_argument("--layers", help="layers (default: all but the last two)")
    parser.add_argument("--k", type=positive, required=True, help="latents that survive")
    parser.add_argument("--width", type=positive, help="latents (default: the hidden size)")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--train-tokens", type=positive, default=500_000, help="seen in training")
    parser.add_argument(
        "--stored-tokens", type=positive, default=200_000, help="hidden states held in memory"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--checkpoints", nargs=2, metavar="RUN", help="two runs of a TopK LM to match likewise"
    )
    add_record_arguments(parser)
    parser.add_argument("--min-count", type=positive, default=50, help="activations of a neuron")
    parser.add_argument("--threshold", type=float, default=0.7, help="least affinity of a match")
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train what is not there, record both seeds, match."""
    from topk_megatron.analysis.sae.results import MatchConfig, write_matches
    from topk_megatron.analysis.sae.run import baseline
    from topk_megatron.analysis.study import open_runs, read_json
    from topk_megatron.errors import AnalysisError

    if len(set(args.seeds)) != 2:
        raise AnalysisError("--seeds needs two different seeds")
    comparisons = {}
    if args.checkpoints:
        one, other = open_runs(args.study, args.checkpoints)
        comparisons["topk_checkpoints"] = (one, other)
    config = record_config(args, raw=False)
    runs, decoders, facts = baseline(args, config)
    comparisons["sae_seeds"] = runs
    matching = MatchConfig(
        study=args.study,
        min_count=args.min_count,
        threshold=args.threshold,
        bootstrap=args.bootstrap,
    )
    write_matches(matching, comparisons, decoders, facts)
    for entry in read_json(args.study / "sae" / "claims.json"):
        for row in entry["rows"]:
            if row["value"] is not None:
                print(f"{row['name']}: {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
