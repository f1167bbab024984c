"""Print text generated from a Megatron checkpoint.

python tools/sample.py --load runs/quickstart/topk --prompt "**ROMEO**" --tokens 80
"""

import argparse
import contextlib
import sys
from pathlib import Path

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--iteration", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--tokenizer-model", type=Path, help="tokenizer (default: the one that training used)"
    )
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--tokens", type=int, default=80, help="tokens to generate per prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--topk-trust-checkpoint",
        action="store_true",
        help="open the checkpoint even if it holds objects that could run code",
    )
    args = parser.parse_args()
    if not args.temperature >= 0:
        parser.error(f"--temperature must be at least 0, got {args.temperature}")
    return args


@exit_on_user_error
def main() -> None:
    """Load the model once, then continue every prompt."""
    args = parse()
    device = prepare_device()
    from topk_megatron.train.sample import Sampler

    # Megatron prints while it loads; standard output is for the text.
    with contextlib.redirect_stdout(sys.stderr):
        sampler = Sampler(
            args.load,
            device,
            iteration=args.iteration,
            tokenizer_model=args.tokenizer_model,
            trust=args.topk_trust_checkpoint,
        )
    for prompt in args.prompt:
        text = sampler(prompt, args.tokens, temperature=args.temperature, seed=args.seed)
        print(f"{prompt}{text}\n")


if __name__ == "__main__":
    main()
