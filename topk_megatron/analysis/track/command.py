"""analyze track: the same neuron over the checkpoints of a training run and across layers."""

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
        "track", help="follow neurons over checkpoints and layers", description=__doc__
    )
    parser.add_argument(
        "--trajectory", type=Path, required=True, help="folder with trajectory.json"
    )
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")
    parser.add_argument("--name", default="trajectory", help="runs are called NAME@ITERATION")
    add_corpus_arguments(parser)
    parser.add_argument("--layers", help="layers to follow (default: the TopK layers)")
    parser.add_argument("--k", type=positive, help="neurons to keep of dense models")
    add_record_arguments(parser)
    parser.add_argument("--min-count", type=positive, default=50, help="activations of a neuron")
    parser.add_argument(
        "--specialised-bits", type=float, default=2.0, help="bits below the corpus's entropy"
    )
    parser.add_argument("--formed-similarity", type=float, default=0.5)
    parser.add_argument(
        "--context-neurons", type=int, default=32, help="of a layer, to embed; 0 embeds none"
    )
    parser.add_argument("--embedding", type=Path, help="sentence-transformers folder")
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Record what is not recorded yet, then compare."""
    from topk_megatron.analysis.entropy.semantic import load_embedding
    from topk_megatron.analysis.record.ranks import join_ranks
    from topk_megatron.analysis.track.results import track
    from topk_megatron.analysis.track.revisions import Text, read_trajectory, record_trajectory
    from topk_megatron.analysis.track.run import TrackConfig
    from topk_megatron.errors import AnalysisError

    ranks = join_ranks()
    revisions = read_trajectory(args.trajectory)
    runs = record_trajectory(
        revisions,
        Text(path=args.corpus, documents=args.documents, max_tokens=args.max_tokens),
        record_config(args, raw=False),
        ranks,
        source={"layers": args.layers, "k": args.k},
    )
    if ranks.rank:
        return
    config = TrackConfig(
        study=args.study,
        min_count=args.min_count,
        specialised_bits=args.specialised_bits,
        formed_similarity=args.formed_similarity,
        context_neurons=args.context_neurons,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    embed, refused = None, None
    if args.context_neurons:
        try:
            embed = load_embedding(args.embedding)
        except AnalysisError as error:
            refused = str(error)
            print(f"context similarity: {refused}")
    facts = {"trajectory": str(args.trajectory), "context_refused": refused}
    track(config, revisions, runs, embed, facts)
    _show(args.study)


def _show(study: Path) -> None:
    from topk_megatron.analysis.study import read_json

    for entry in read_json(study / "track" / "claims.json"):
        numbers = ", ".join(
            f"{row['name']} {row['value']:.3f}" for row in entry["rows"] if row["value"] is not None
        )
        print(f"{entry['claim']}: {numbers}")
