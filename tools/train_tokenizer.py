"""Train a sentencepiece tokenizer on .txt, .md or .jsonl files (also .gz, .zst, and globs).

python tools/train_tokenizer.py --input 'plays/**/*.md' --output tokenizer.model --vocab-size 4096
"""

import argparse
from pathlib import Path

from topk_megatron.cli import exit_on_user_error
from topk_megatron.text.tokenizer import train_sentencepiece


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="text files or globs")
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of pieces, including bytes"
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--character-coverage", type=float, default=0.9995)
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    parser.add_argument(
        "--max-sentences", type=int, default=5_000_000, help="lines to sample from a larger corpus"
    )
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Train, and print the result."""
    args = parse()
    lines = train_sentencepiece(
        args.input,
        args.output,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        json_key=args.json_key,
        max_sentences=args.max_sentences,
    )
    print(f"{args.output}: {args.vocab_size} pieces ({args.model_type}) from {lines:,} lines")


if __name__ == "__main__":
    main()
