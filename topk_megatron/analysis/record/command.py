"""analyze record: what the neurons of a model do on a corpus."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose text; shared by the commands that run a model over a corpus."""
    parser.add_argument(
        "--corpus", required=True, help="prefix of a Megatron dataset, or text files (name or glob)"
    )
    parser.add_argument(
        "--documents",
        metavar="A:B",
        help="only these, as in Python; the last four: --documents=-4:",
    )
    parser.add_argument("--max-tokens", type=int, help="only the first so many tokens")
    parser.add_argument(
        "--seq-length", type=int, help="tokens of a sequence (default: the model's)"
    )
    parser.add_argument("--batch-size", type=int, help="sequences of a forward pass")


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is kept."""
    parser.add_argument("--block-tokens", type=int, default=16384, help="tokens of a unit of work")
    parser.add_argument("--top-n", type=int, default=20, help="examples of every neuron")
    parser.add_argument("--context-before", type=int, default=16, help="tokens of a window before")
    parser.add_argument("--context-after", type=int, default=8, help="and after the example")
    parser.add_argument(
        "--bootstrap-neurons",
        type=int,
        default=32,
        help="neurons of a layer whose counts are kept by block, for intervals over the text",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run of this name")


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "record",
        help="run a model over a corpus and keep what its neurons did",
        description=__doc__,
    )
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")
    parser.add_argument("--name", required=True, help="what the run is called in the study")
    add_corpus_arguments(parser)
    parser.add_argument("--layers", help="0-3, 0,2, all, all,-2 (default: the TopK layers)")
    parser.add_argument("--k", type=int, help="neurons to keep of a dense model")
    parser.add_argument(
        "--mode", choices=("value", "abs"), default="value", help="dense model's rule"
    )
    parser.add_argument(
        "--sae", type=Path, nargs="+", default=[], help="SAE directories, a layer each"
    )
    parser.add_argument(
        "--aggregate-only", action="store_true", help="do not write single activations"
    )
    add_record_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Record, and say how fast and how large."""
    from topk_megatron.analysis.corpus import open_corpus
    from topk_megatron.analysis.record.ranks import join_ranks
    from topk_megatron.analysis.record.run import record
    from topk_megatron.analysis.sources import make_source
    from topk_megatron.analysis.study import read_json
    from topk_megatron.hf.model import open_model

    ranks = join_ranks()
    folder = open_model(args.model)
    source = make_source(folder, layers=args.layers, k=args.k, mode=args.mode, sae=args.sae)
    corpus = open_corpus(
        args.corpus, lambda: folder.tokenizer, documents=args.documents, max_tokens=args.max_tokens
    )
    config = record_config(args, raw=not args.aggregate_only)
    done = record(source, corpus, config, ranks, progress if ranks.rank == 0 else lambda *_: None)
    if ranks.rank == 0:
        speed = read_json(done.directory / "speed.json")
        rate = speed["tokens_per_second"]
        raw = speed["raw_bytes_per_token"]
        print(
            f"{done.directory}: {done.kind}, {len(done.layers)} layers of {done.width} neurons, "
            f"{done.manifest['corpus']['tokens']:,} tokens"
            + (f", {rate:,.0f} tokens/s" if rate else ", recorded before")
            + (f", {raw:,.0f} bytes/token" if raw else "")
            + f", aggregates {speed['aggregate_bytes'] / 1e6:.1f} MB"
        )


def record_config(args: argparse.Namespace, *, raw: bool) -> Any:
    """The settings of `record` from the command line."""
    from topk_megatron.analysis.record.run import RecordConfig

    return RecordConfig(
        study=args.study,
        run=args.name,
        seq_length=args.seq_length,
        batch_size=args.batch_size,
        block_tokens=args.block_tokens,
        top_n=args.top_n,
        before=args.context_before,
        after=args.context_after,
        raw=raw,
        bootstrap_neurons=args.bootstrap_neurons,
        overwrite=args.overwrite,
    )


def progress(done: int, total: int) -> None:
    """A line on standard error now and then."""
    if done % max(1, total // 10) == 0 or done == total:
        print(f"recorded {done} of {total} blocks", file=sys.stderr, flush=True)
