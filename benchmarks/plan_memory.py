"""Compares the planner's memory with Megatron's own report: the table of docs/planning.md.

    python benchmarks/plan_memory.py

Both are formulas for a GPU of the first pipeline stage without recompute; nothing is measured.
Megatron's are in megatron/training/theoretical_memory_usage.py, called with the arguments of the
files in configs/ as Megatron itself parses and completes them.
"""

import contextlib
import io
import sys
import warnings
from pathlib import Path
from typing import Any

from topk_megatron.compat import prepare_device
from topk_megatron.plan.command_lines import layout_in, read_flags, shape_of
from topk_megatron.plan.dry_run import rank_zero
from topk_megatron.plan.memory import memory_of

REPOSITORY = Path(__file__).resolve().parents[1]

GPUS = {"1b": 8, "7b": 64, "70b": 512, "500b": 3072}
HEADER = """\
| model | layout | weights, gradients, optimizer, GB: plan, Megatron | activations, GB: plan, Megatron | ratio |
|---|---|---|---|---|"""  # noqa: E501


def megatron_memory(flags: list[str], gpus: int) -> tuple[float, float]:
    """Return bytes per GPU by Megatron's report: weights and optimizer, and activations."""
    prepare_device()
    from megatron.training import theoretical_memory_usage as report

    with rank_zero(gpus):
        args = megatron_arguments(flags)
        count = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        states = report.compute_weight_and_optimizer_memory(args)
        return states, report.compute_activation_memory(args, num_microbatches=count)


def megatron_arguments(flags: list[str]) -> Any:
    """Parse and complete the flags as Megatron does, and pad the vocabulary."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from topk_megatron.train.arguments import arguments_provider

    before = sys.argv
    sys.argv = ["report", *flags, "--mock-data"]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            args: Any = parse_args(arguments_provider("cpu"))
            validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    return args


def rows() -> list[str]:
    """Return one line per model."""
    lines = []
    for name, gpus in GPUS.items():
        flags = read_flags(REPOSITORY / "configs" / f"{name}.args")
        layout = layout_in(flags, gpus)
        plan = memory_of(shape_of(flags), layout, 0)
        states, activations = megatron_memory(flags, gpus)
        lines.append(
            f"| {name} | {layout.words()} | {plan.states / 1e9:.3f}, {states / 1e9:.3f} | "
            f"{plan.dense / 1e9:.2f}, {activations / 1e9:.2f} | {plan.dense / activations:.3f} |"
        )
    return lines


if __name__ == "__main__":
    print(HEADER, *rows(), sep="\n")
