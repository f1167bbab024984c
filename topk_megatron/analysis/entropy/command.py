"""analyze entropy: how specialised the neurons of recorded runs are, and compared with what."""

import argparse
from pathlib import Path
from typing import Any

from topk_megatron.analysis.arguments import positive, share


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "entropy", help="token and semantic entropy of every neuron", description=__doc__
    )
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")
    parser.add_argument(
        "--runs", nargs="+", required=True, help="runs to compare; the first with each other one"
    )
    parser.add_argument("--min-count", type=positive, default=50, help="activations of a neuron")
    parser.add_argument("--no-semantic", action="store_true", help="token entropies only")
    parser.add_argument("--semantic-neurons", type=positive, help="of each layer (default: all)")
    parser.add_argument("--embedding", type=Path, help="sentence-transformers folder")
    parser.add_argument("--distance", type=share, help="cosine distance between clusters")
    parser.add_argument(
        "--distance-quantile",
        type=share,
        default=0.05,
        help="without --distance: share of random pairs of contexts that lie closer",
    )
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, and print the means over all layers."""
    from topk_megatron.analysis.entropy.run import EntropyConfig, entropy
    from topk_megatron.analysis.tables import read_table

    parameters = entropy(
        EntropyConfig(
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
    )
    if parameters["semantic_refused"]:
        print(f"semantic entropy: {parameters['semantic_refused']}")
    rows = read_table(args.study / "entropy" / "summary.parquet").to_pylist()
    print(f"{'run':<24}{'measure':<24}{'neurons':>8}{'bits':>8}   95 % interval, resampled")
    for row in rows:
        if row["layer"] == -1:
            print(
                f"{row['run']:<24}{row['measure']:<24}{row['neurons']:>8}{row['mean']:>8.3f}"
                f"   {row['low']:.3f} to {row['high']:.3f}, {row['resampled']}"
            )
