"""Tokenize .txt, .md or .jsonl files (also .gz, .zst, and globs) into a Megatron dataset.

    python tools/preprocess_data.py --input 'plays/**/*.md' --output-prefix data/plays \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 2

A .txt or .md file is one document, and so is a line of .jsonl. Writes PREFIX.bin, PREFIX.idx and
PREFIX.manifest.json; give PREFIX to pretrain_topk_gpt.py as --data-path.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device
from topk_megatron.text.preprocess import PreprocessConfig, Summary, preprocess
from topk_megatron.text.tokenizer import add_tokenizer_arguments


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="text files or globs")
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="path prefix of the dataset"
    )
    add_tokenizer_arguments(parser)
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing processes")
    parser.add_argument(
        "--no-eod", action="store_true", help="do not append end-of-document tokens"
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="skip bad lines instead of failing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args()
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}")
    return args


def report(output: Path, summary: Summary, seconds: float) -> None:
    """Print what was written, and on standard error what was skipped."""
    for line in summary.first_bad_lines:
        print(f"skipped {line}", file=sys.stderr)
    if summary.bad_lines:
        print(f"skipped {summary.bad_lines} bad lines in total", file=sys.stderr)
    if summary.empty_documents:
        print(f"skipped {summary.empty_documents:,} empty documents", file=sys.stderr)
    print(
        f"{output}: {summary.documents:,} documents, {summary.tokens:,} tokens, "
        f"{summary.text_bytes / max(summary.tokens, 1):.2f} bytes/token, "
        f"{summary.tokens / seconds:,.0f} tokens/s"
    )


@exit_on_user_error
def main() -> None:
    """Tokenize and report."""
    args = parse()
    prepare_device()
    started = time.perf_counter()
    summary = preprocess(
        PreprocessConfig(
            inputs=args.input,
            output=args.output_prefix,
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
            json_key=args.json_key,
            append_eod=not args.no_eod,
            workers=args.workers,
            skip_bad_lines=args.skip_bad_lines,
            overwrite=args.overwrite,
        )
    )
    report(args.output_prefix, summary, time.perf_counter() - started)


if __name__ == "__main__":
    main()
