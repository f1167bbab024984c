"""Measures the cost of a TopK, of its statistics and of attention in a training step.

    python benchmarks/train_step.py [--hidden-size 256 --layers 6 …]

Builds Megatron's GPT model with equal weights: dense, TopK, TopK with the statistics of every step,
TopK with those of a logged step and, without Transformer Engine, dense with Megatron's own core
attention instead of torch's fused kernels. Runs forward and backward of the same batch in turn, in
a single process (one thread on a CPU), and prints medians and ratios of one run.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from topk_megatron.compat import prepare_device


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=25)
    return parser.parse_args()


def megatron_flags(args: argparse.Namespace) -> list[str]:
    """Return Megatron's flags for the quickstart's architecture at the given sizes."""
    return [
        *("--num-layers", args.layers, "--hidden-size", args.hidden_size),
        *("--num-attention-heads", args.heads, "--seq-length", args.seq_length),
        *("--max-position-embeddings", args.seq_length, "--position-embedding-type", "rope"),
        *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--mock-data"),
        *("--micro-batch-size", args.batch, "--train-iters", "1", "--lr", "1e-3"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "4095", "--topk-k", args.k),
    ]


def models(args: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """Build the models, all with the same weights; return model and runtime by name."""
    from megatron.core.transformer.enums import AttnBackend

    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model

    runtimes = {
        "dense": None,
        "topk, no statistics": TopKRuntime(config, probing=False),
        "topk": TopKRuntime(config),
        "topk, logged step": TopKRuntime(config),
    }
    where = torch.cuda.current_device()
    built = {
        name: (build_model(args, runtime).to(where).train(), runtime)
        for name, runtime in runtimes.items()
    }
    if args.transformer_impl == "local":
        unfused = Namespace(**{**vars(args), "attention_backend": AttnBackend.unfused})
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name)  # Megatron refuses a second backend in one process
        built["dense, unfused attention"] = build_model(unfused, None).to(where).train(), None
    for probe in runtimes["topk, logged step"].probes.values():  # pyright: ignore
        probe.measuring = True
    weights = built["dense"][0].state_dict()
    for model, _ in built.values():
        model.load_state_dict(weights)
    return built


def one_step(model: Any, runtime: Any, batch: tuple[torch.Tensor, ...]) -> None:
    """Run forward and backward of one microbatch, and the bookkeeping of its step."""
    tokens, positions = batch
    model.zero_grad(set_to_none=True)
    model(tokens, positions, None, labels=tokens).mean().backward()
    if runtime is not None and runtime.probing:
        for probe in runtime.probes.values():
            probe.end_step(tokens.numel())


def timed(function: Callable[[], None]) -> float:
    """Return the seconds of one call, with the device idle before and after."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure the models in turn, and print the table."""
    sizes = parse()
    device = prepare_device()
    if device == "cpu":
        torch.set_num_threads(1)
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.train.main import be_one_process
    from topk_megatron.train.main import parse as parse_megatron

    sys.argv = [sys.argv[0], *map(str, megatron_flags(sizes))]
    be_one_process()
    skip_dataset_compiler()
    args, config = parse_megatron(device)
    initialize_megatron()
    built = models(args, config)
    where = torch.cuda.current_device()
    tokens = torch.randint(0, 4095, (sizes.batch, sizes.seq_length)).to(where)
    batch = (tokens, torch.arange(sizes.seq_length, device=where).expand_as(tokens))
    times: dict[str, list[float]] = {name: [] for name in built}
    for repeat in range(sizes.repeats + 2):
        for name, (model, runtime) in built.items():
            seconds = timed(lambda m=model, r=runtime: one_step(m, r, batch))
            if repeat >= 2:  # the first two warm up
                times[name].append(seconds)
    report(sizes, device, times)


def report(sizes: argparse.Namespace, device: str, times: dict[str, list[float]]) -> None:
    """Print medians, and medians of the ratios to the neighbouring dense step."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"\n# {platform.platform()}, {machine or platform.machine()}, torch {torch.__version__}")
    print(f"# {vars(sizes)}")
    print(f"{'step':<28}{'median ms':>12}{'ratio to dense':>16}")
    for name, values in times.items():
        ratios = [mine / dense for mine, dense in zip(values, times["dense"], strict=True)]
        milliseconds = 1e3 * statistics.median(values)
        print(f"{name:<28}{milliseconds:>12.1f}{statistics.median(ratios):>16.4f}")


if __name__ == "__main__":
    main()
