"""Convert checkpoints between Megatron (torch_dist) and Hugging Face.

python tools/convert_checkpoint.py to-hf --load runs/topk --save runs/topk-hf
python tools/convert_checkpoint.py to-hf --load runs/topk --all-iterations --save runs/trajectory
python tools/convert_checkpoint.py to-megatron --load runs/topk-hf --save runs/again
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.errors import ConfigError
from topk_megatron.hf.export import ExportSettings, export_checkpoint, export_trajectory
from topk_megatron.hf.model import DTYPES
from topk_megatron.hf.restore import RestoreSettings, restore_checkpoint

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_to_hf(
        commands.add_parser("to-hf", help="convert a Megatron checkpoint to a Hugging Face folder")
    )
    _add_to_megatron(
        commands.add_parser(
            "to-megatron",
            help="convert an exported folder, or a dense Llama, Qwen2 or Qwen3, to a Megatron "
            "checkpoint",
        )
    )
    return parser.parse_args()


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", type=Path, required=True, help="the directory given to Megatron's --save")
    add("--save", type=Path, required=True, help="the folder to create; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--iteration", type=int, help="which checkpoint (default: the latest)")
    which.add_argument(
        "--all-iterations",
        action="store_true",
        help="export every checkpoint to a folder of its own, and write trajectory.json",
    )
    add("--dtype", choices=sorted(DTYPES), help="dtype of the weights (default: the checkpoint's)")
    add(
        "--dense",
        action="store_true",
        help="the checkpoint is one of stock Megatron, without TopK settings",
    )
    add("--shard-size", default="2GB", help="largest safetensors file (default: %(default)s)")
    add("--tokenizer-model", help="the tokenizer (default: where training found it)")
    add("--no-tokenizer", action="store_true", help="do not convert the tokenizer")


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", type=Path, required=True, help="the Hugging Face folder")
    add("--save", type=Path, required=True, help="the checkpoint to create; must not exist")
    add(
        "--tp",
        type=int,
        default=1,
        help="tensor-parallel size of the next run. A torch_dist checkpoint loads in any layout; "
        "this decides only to which multiple the vocabulary is padded (default: %(default)s)",
    )
    add("--pp", type=int, default=1, help="pipeline-parallel size; only recorded")
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="as in Megatron (default: the exported run's, or 128 for other models)",
    )
    add("--no-tokenizer", action="store_true", help="do not convert the tokenizer")


def read_size(text: str) -> int:
    """Return the bytes of 2GB, 500MB, 1GiB or a plain number."""
    upper = text.strip().upper()
    for unit, factor in _UNITS.items():
        if upper.endswith(unit):
            number, scale = upper.removesuffix(unit), factor
            break
    else:
        number, scale = upper, 1
    try:
        size = int(float(number) * scale)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"--shard-size takes a size such as 2GB or 500MB, got {text!r}")
    return size


@contextmanager
def bars() -> Iterator[Any]:
    """Yield a function that shows a progress bar; all bars are closed, even after an error."""
    from tqdm import tqdm

    shown: list[Any] = []

    def bar(total: int) -> Any:
        if shown:
            shown[-1].close()
        shown.append(tqdm(total=total, unit="B", unit_scale=True, desc="converting"))
        return shown[-1].update

    try:
        yield bar
    finally:
        for one in shown:
            one.close()


def _to_hf(args: argparse.Namespace) -> None:
    settings = ExportSettings(
        dense=args.dense,
        dtype=args.dtype,
        shard_size=read_size(args.shard_size),
        tokenizer_model=args.tokenizer_model,
        tokenizer=not args.no_tokenizer,
    )
    if args.all_iterations:
        with bars() as bar:
            revisions = export_trajectory(args.load, args.save, settings, progress=bar)
        print(f"{args.save}: {len(revisions)} revisions, see trajectory.json")
        return
    with bars() as bar:
        source = export_checkpoint(
            args.load, args.save, settings, iteration=args.iteration, progress=bar
        )
    print(f"{args.save}: iteration {source.iteration}, {source.tokens_seen:,} tokens seen")


def _to_megatron(args: argparse.Namespace) -> None:
    settings = RestoreSettings(
        tp=args.tp,
        pp=args.pp,
        divisible_by=args.make_vocab_size_divisible_by,
        tokenizer=not args.no_tokenizer,
    )
    with bars() as bar:
        source = restore_checkpoint(args.load, args.save, settings, progress=bar)
    print(f"{args.save}: iteration {source.iteration}; it has no optimizer, so continue with")
    if source.is_export:
        print(f"  --load {args.save} --no-load-optim --no-load-rng")
    else:
        print(f"  --load {args.save} --finetune, and the --topk-... flags of the new TopK LM")


def _stop(number: int, frame: Any) -> None:
    print(
        "error: stopped by a signal; the unfinished conversion is removed",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(128 + number)  # unwinding removes it


@exit_on_user_error
def main() -> None:
    """Convert, and print the result."""
    args = parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    {"to-hf": _to_hf, "to-megatron": _to_megatron}[args.command](args)


if __name__ == "__main__":
    main()
