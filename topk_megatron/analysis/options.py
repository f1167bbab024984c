"""Flags that several command lines of the analysis share."""

import argparse
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """Parse an integer that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def share(text: str) -> float:
    """Parse a number strictly between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number


def add_study_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that every command has."""
    parser.add_argument("--study", type=Path, required=True, help="directory of all results")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose text, for commands that run a model over a corpus."""
    parser.add_argument(
        "--corpus", required=True, help="prefix of a Megatron dataset, or text files (name or glob)"
    )
    parser.add_argument(
        "--documents",
        metavar="A:B",
        help="only these documents, as a Python slice; the last four: --documents=-4:",
    )
    parser.add_argument("--max-tokens", type=int, help="use only this many tokens from the start")
    parser.add_argument("--seq-length", type=int, help="tokens per sequence (default: the model's)")
    parser.add_argument("--batch-size", type=int, help="sequences per forward pass")


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose what a recording keeps."""
    parser.add_argument("--block-tokens", type=int, default=16384, help="tokens per unit of work")
    parser.add_argument("--top-n", type=int, default=20, help="examples kept per neuron")
    parser.add_argument(
        "--context-before", type=int, default=16, help="tokens of an example before it"
    )
    parser.add_argument(
        "--context-after", type=int, default=8, help="tokens of an example after it"
    )
    parser.add_argument(
        "--bootstrap-neurons",
        type=int,
        default=32,
        help="neurons per layer whose counts are kept by block, for intervals over the text",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run of this name")


def record_config(args: argparse.Namespace, *, raw: bool = False) -> Any:
    """Return the `RecordConfig` of a command line; `raw` keeps single activations."""
    from topk_megatron.analysis.record.plan import RecordConfig

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


def add_mean_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose neurons for a mean, and make its interval."""
    parser.add_argument(
        "--min-count", type=positive, default=50, help="activations that a neuron needs"
    )
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples of an interval")
