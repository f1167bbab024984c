"""Generate text with an exported model, and push a neuron if asked to.

python tools/generate.py --model runs/quickstart/hf/topk --prompt "**ROMEO**" --tokens 80
python tools/generate.py --model hf/topk --prompt "To be" --neuron 3:17 --set 4.0
"""

import argparse
import re
from pathlib import Path
from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.errors import ConfigError
from topk_megatron.hf.model import DTYPES, OpenModel, open_model


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder; its modeling code runs")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--tokens", type=int, default=80, help="tokens to generate per prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the most likely token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--neuron", metavar="LAYER:NEURON", help="a neuron to push at every position"
    )
    push = parser.add_mutually_exclusive_group()
    for op in ("set", "add", "scale"):
        push.add_argument(f"--{op}", type=float, metavar="VALUE", help=f"{op} the neuron's value")
    push.add_argument("--ablate", action="store_true", help="switch the neuron off")
    return parser.parse_args()


def intervention(args: argparse.Namespace) -> Any:
    """Return the requested push, or None."""
    from topk_megatron.hf import Intervention

    values = {op: getattr(args, op) for op in ("set", "add", "scale")}
    chosen: dict[str, float | None] = {op: v for op, v in values.items() if v is not None}
    if args.ablate:
        chosen = {"ablate": None}
    if args.neuron is None and not chosen:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", args.neuron or "")
    if match is None or not chosen:
        raise ConfigError(
            "--neuron LAYER:NEURON (both from 0) and one of --set, --add, --scale, --ablate belong "
            f"together; got --neuron {args.neuron} and {', '.join(chosen) or 'no operation'}"
        )
    op, value = next(iter(chosen.items()))
    return Intervention(layer=int(match[1]), neuron=int(match[2]), op=op, value=value)


def write(opened: OpenModel, prompt: str, args: argparse.Namespace) -> str:
    """Return the continuation of one prompt."""
    import torch

    tokens = opened.encode(prompt)
    start: Any = opened.model.config.eos_token_id
    tokens = tokens or [start[0] if isinstance(start, list) else start]
    if len(tokens) + args.tokens > opened.max_length:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens and --tokens is {args.tokens}: together they "
            f"must be at most {opened.max_length}, the length that the model was trained with"
        )
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    with torch.inference_mode():
        written = opened.model.generate(
            torch.tensor([tokens], device=opened.model.device),
            attention_mask=torch.ones(1, len(tokens), device=opened.model.device),
            max_new_tokens=args.tokens,
            **(sampling if args.temperature else {"do_sample": False}),
        )
    return opened.tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True)


@exit_on_user_error
def main() -> None:
    """Open once, then continue every prompt."""
    args = parse()
    if not args.temperature >= 0:
        raise ConfigError(f"--temperature must be at least 0, got {args.temperature}")
    if args.tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, got {args.tokens}")
    push = intervention(args)
    opened = open_model(args.model, dtype=args.dtype, device=args.device)
    if push is None:
        texts = [write(opened, prompt, args) for prompt in args.prompt]
    else:
        if not opened.is_topk:
            raise ConfigError(f"{args.model} is a dense model: it has no TopK neuron to push")
        try:
            with opened.model.intervene(push):
                texts = [write(opened, prompt, args) for prompt in args.prompt]
        except ValueError as error:
            raise ConfigError(f"--neuron {args.neuron}: {error}") from error
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}\n")


if __name__ == "__main__":
    main()
