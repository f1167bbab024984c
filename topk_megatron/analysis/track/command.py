"""analyze track: the same neuron over the checkpoints of a training run and across layers."""

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
        "track", help="follow neurons over checkpoints and layers", description=__doc__
    )
    parser.add_argument(
        "--trajectory", type=Path, required=True, help="folder with trajectory.json"
    )
    add_study_argument(parser)
    parser.add_argument(
        "--name", default="trajectory", help="runs are called NAME@CHECKPOINT (default: trajectory)"
    )
    add_corpus_arguments(parser)
    parser.add_argument("--layers", help="layers to follow (default: the TopK layers)")
    parser.add_argument("--k", type=positive, help="neurons to keep per token of dense models")
    add_record_arguments(parser)
    parser.add_argument(
        "--specialised-bits",
        type=float,
        default=2.0,
        help="how far below the corpus's entropy a specialised neuron must be, in bits",
    )
    parser.add_argument(
        "--formed-similarity",
        type=float,
        default=0.5,
        help="least similarity of a formed neuron to itself at the end",
    )
    parser.add_argument(
        "--context-neurons",
        type=int,
        default=32,
        help="neurons per layer whose contexts are embedded; 0 embeds none",
    )
    parser.add_argument("--embedding", type=Path, help="sentence-transformers folder")
    add_mean_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Record what is not recorded yet, compare, write, and print the claims."""
    from topk_megatron.analysis.record.run import join_ranks
    from topk_megatron.analysis.result import write_result
    from topk_megatron.analysis.track.results import track
    from topk_megatron.analysis.track.revisions import Text, read_trajectory, record_trajectory
    from topk_megatron.analysis.track.run import TrackConfig

    ranks = join_ranks()
    revisions = read_trajectory(args.trajectory)
    runs = record_trajectory(
        revisions,
        Text(path=args.corpus, documents=args.documents, max_tokens=args.max_tokens),
        record_config(args),
        ranks,
        source={"layers": args.layers, "k": args.k},
    )
    if ranks.rank:
        return
    config = TrackConfig(
        min_count=args.min_count,
        specialised_bits=args.specialised_bits,
        formed_similarity=args.formed_similarity,
        context_neurons=args.context_neurons,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    embed, refused = _load_embedding(args)
    facts = {"trajectory": str(args.trajectory), "context_refused": refused}
    result = track(config, revisions, runs, embed, facts)
    write_result(args.study, "track", result)
    for entry in result.claims:
        numbers = ", ".join(
            f"{row['name']} {row['value']:.3f}" for row in entry["rows"] if row["value"] is not None
        )
        print(f"{entry['claim']}: {numbers}")


def _load_embedding(args: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the embedding model if it is wanted, and why it could not be loaded."""
    from topk_megatron.analysis.entropy.semantic import load_embedding
    from topk_megatron.errors import AnalysisError

    if not args.context_neurons:
        return None, None
    try:
        return load_embedding(args.embedding), None
    except AnalysisError as error:
        print(f"context similarity: {error}")
        return None, str(error)
