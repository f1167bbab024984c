"""analyze entropy: how specialised the neurons of recorded runs are, compared with each other."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.options import (
    add_mean_arguments,
    add_study_argument,
    positive,
    share,
)


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "entropy", help="token and semantic entropy of every neuron", description=__doc__
    )
    add_study_argument(parser)
    parser.add_argument(
        "--runs", nargs="+", required=True, help="runs to compare: the first with each other one"
    )
    parser.add_argument("--no-semantic", action="store_true", help="token entropies only")
    parser.add_argument(
        "--semantic-neurons", type=positive, help="neurons per layer to embed (default: all)"
    )
    parser.add_argument("--embedding", type=Path, help="sentence-transformers folder")
    parser.add_argument(
        "--distance", type=share, help="cosine distance that separates clusters of contexts"
    )
    parser.add_argument(
        "--distance-quantile",
        type=share,
        default=0.05,
        help="without --distance: the share of random pairs of contexts that are closer",
    )
    add_mean_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, write, and print the means over all layers."""
    from topk_megatron.analysis.entropy.results import entropy
    from topk_megatron.analysis.entropy.run import EntropyConfig
    from topk_megatron.analysis.result import write_result
    from topk_megatron.analysis.tables import ALL_LAYERS

    config = EntropyConfig(
        study=args.study,
        runs=args.runs,
        min_count=args.min_count,
        semantic=not args.no_semantic,
        semantic_neurons=args.semantic_neurons,
        embedding=args.embedding,
        distance=args.distance,
        distance_quantile=args.distance_quantile,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    result = entropy(config)
    write_result(args.study, "entropy", result)
    if result.parameters["semantic_refused"]:
        print(f"semantic entropy: {result.parameters['semantic_refused']}")
    print(f"{'run':<24}{'measure':<24}{'neurons':>8}{'bits':>8}   95 % interval, resampled")
    for row in result.tables["summary"].to_pylist():
        if row["layer"] == ALL_LAYERS:
            print(
                f"{row['run']:<24}{row['measure']:<24}{row['neurons']:>8}{row['mean']:>8.3f}"
                f"   {row['low']:.3f} to {row['high']:.3f}, {row['resampled']}"
            )
