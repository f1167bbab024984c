"""analyze record: run a model over a corpus and keep what its neurons did."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from topk_megatron.analysis.options import (
    add_corpus_arguments,
    add_record_arguments,
    add_study_argument,
    record_config,
)
from topk_megatron.config import Mode


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "record",
        help="run a model over a corpus and keep what its neurons did",
        description=__doc__,
    )
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    add_study_argument(parser)
    parser.add_argument("--name", required=True, help="name of the run in the study")
    add_corpus_arguments(parser)
    parser.add_argument("--layers", help="0-3, 0,2, all, all,-2 (default: the TopK layers)")
    parser.add_argument("--k", type=int, help="neurons to keep per token of a dense model")
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="value",
        help="keep a dense model's largest values or absolute values",
    )
    parser.add_argument(
        "--sae", type=Path, nargs="+", default=[], help="SAE directories, one per layer"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--activations",
        action="store_true",
        help="also keep every single activation (about 4 bytes each)",
    )
    # The default since single activations are kept on request only; older scripts still give it.
    kept.add_argument("--aggregate-only", action="store_true", help=argparse.SUPPRESS)
    add_record_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Record, and print how fast it was and how much it wrote."""
    from topk_megatron.analysis.corpus import open_corpus
    from topk_megatron.analysis.record.run import join_ranks, record
    from topk_megatron.analysis.sources import make_source
    from topk_megatron.hf.model import open_model

    ranks = join_ranks()
    folder = open_model(args.model)
    source = make_source(folder, layers=args.layers, k=args.k, mode=args.mode, sae=args.sae)
    corpus = open_corpus(
        args.corpus, lambda: folder.tokenizer, documents=args.documents, max_tokens=args.max_tokens
    )
    config = record_config(args, raw=args.activations)
    done = record(source, corpus, config, ranks, progress if ranks.rank == 0 else lambda *_: None)
    if ranks.rank == 0:
        rate, raw = done.speed["tokens_per_second"], done.speed["raw_bytes_per_token"]
        print(
            f"{done.directory}: {done.kind}, {len(done.layers)} layers of {done.width} neurons, "
            f"{done.manifest['corpus']['tokens']:,} tokens"
            + (f", {rate:,.0f} tokens/s" if rate else ", recorded before")
            + (f", {raw:,.0f} bytes/token" if raw else "")
            + f", aggregates {done.speed['aggregate_bytes'] / 1e6:.1f} MB"
        )


def progress(done: int, total: int) -> None:
    """Print a line on standard error after each tenth of the blocks."""
    if done % max(1, total // 10) == 0 or done == total:
        print(f"recorded {done} of {total} blocks", file=sys.stderr, flush=True)
