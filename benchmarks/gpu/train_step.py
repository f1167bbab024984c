"""A training step of a slice of a 7B model on one GPU: dense, TopK, and TopK without statistics.

    python -m benchmarks.gpu.train_step --output train_step.json

Builds Megatron's GPT model three times with equal weights, by the project's own builder and
defaults, and runs forward and backward of one microbatch in turn; the order rotates from round to
round. The optimizer's step is the same work in all three and is left out, which makes differences
look larger than in training. Differences are paired within a round; the interval is a bootstrap
over rounds.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topk_megatron.compat import prepare_device

STARTED = time.monotonic()
WARM_ROUNDS = 3
FEWEST_ROUNDS = 50  # with fewer, the headline says so
VARIANTS = ("dense", "topk", "topk, no statistics")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the defaults are four layers of configs/7b.args."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--hidden-size", type=int, default=4096)
    add("--ffn-hidden-size", type=int, default=13824)
    add("--heads", type=int, default=32)
    add("--groups", type=int, default=8, help="heads of keys and values")
    add("--seq-length", type=int, default=4096)
    add("--batch", type=int, default=1, help="sequences of a microbatch")
    add("--vocab-size", type=int, default=32768)
    add("--k", type=int, default=256)
    add("--seconds", type=float, default=60, help="since the program's start; then rounds end")
    add("--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args(words)


def megatron_flags(sizes: argparse.Namespace) -> list[str]:
    """Return the flags of the slice; every layer has a TopK, as 30 of the 7B model's 32 do."""
    flags: list[Any] = [
        *("--num-layers", sizes.layers, "--hidden-size", sizes.hidden_size),
        *("--ffn-hidden-size", sizes.ffn_hidden_size, "--num-attention-heads", sizes.heads),
        *("--group-query-attention", "--num-query-groups", sizes.groups),
        *("--seq-length", sizes.seq_length, "--max-position-embeddings", sizes.seq_length),
        *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
        *("--disable-bias-linear", "--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--untie-embeddings-and-output-weights", "--bf16", "--transformer-impl", "local"),
        *("--micro-batch-size", sizes.batch, "--train-iters", "1", "--lr", "1e-4", "--mock-data"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", sizes.vocab_size - 1),
        *("--topk-k", sizes.k, "--topk-layers", "all"),
    ]
    return [str(flag) for flag in flags]


def models(args: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """Build the variants with the same weights; return model and runtime by name."""
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model

    runtimes = (None, TopKRuntime(config), TopKRuntime(config, probing=False))
    where = torch.cuda.current_device()
    built: dict[str, tuple[Any, Any]] = {}
    for name, runtime in zip(VARIANTS, runtimes, strict=True):
        built[name] = (build_model(args, runtime).bfloat16().to(where).train(), runtime)
    weights = built["dense"][0].state_dict()
    for model, _ in built.values():
        model.load_state_dict(weights)
    return built


def one_step(model: Any, runtime: Any, batch: tuple[Any, ...]) -> torch.Tensor:
    """Run forward and backward of one microbatch, and return the loss."""
    tokens, positions, mask = batch
    model.zero_grad(set_to_none=True)
    if runtime is not None:
        runtime.begin_step(0)
    loss = model(tokens, positions, mask, labels=tokens.roll(-1, -1)).float().mean()
    loss.backward()
    if runtime is not None and runtime.probing:
        for probe in runtime.probes.values():
            probe.end_step(tokens.numel())
    return loss.detach()


def timed(step: Any) -> tuple[float, float, float]:
    """Return seconds, peak bytes above what was allocated before, and the loss of one step."""
    cuda = torch.cuda
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before, started = cuda.memory_allocated(), time.perf_counter()
    loss = step()
    cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, float(cuda.max_memory_allocated() - before), float(loss)


def bootstrap(differences: np.ndarray, draws: int = 2000) -> list[float]:
    """Return the 95 % interval of the mean of paired differences."""
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(differences), (draws, len(differences)))
    low, high = np.percentile(differences[chosen].mean(axis=1), (2.5, 97.5))
    return [float(low), float(high)]


def compare(times: dict[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Return how much longer `one` takes than `other`, as a share of the latter's median."""
    pairs = np.array(times[one]) - np.array(times[other])
    shares = pairs / np.median(times[other])
    return {"of": one, "over": other, "mean": float(shares.mean()), "interval": bootstrap(shares)}


def measure(built: dict[str, tuple[Any, Any]], batch: Any, sizes: argparse.Namespace) -> Any:
    """Run the rounds; return seconds by variant, peak bytes and losses."""
    times: dict[str, list[float]] = {name: [] for name in built}
    peaks, losses = dict.fromkeys(built, 0.0), dict.fromkeys(built, 0.0)
    names, number = list(built), 0
    while number < WARM_ROUNDS + 2 or time.monotonic() - STARTED < sizes.seconds:
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            model, runtime = built[name]
            seconds, peak, losses[name] = timed(lambda m=model, r=runtime: one_step(m, r, batch))
            peaks[name] = max(peaks[name], peak)
            if number >= WARM_ROUNDS:
                times[name].append(seconds)
        number += 1
    return times, peaks, losses


def prepare(sizes: argparse.Namespace) -> tuple[dict[str, tuple[Any, Any]], Any, str]:
    """Initialise Megatron, build the models and draw one batch; also name the attention used."""
    device = prepare_device()
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.train.main import be_one_process
    from topk_megatron.train.main import parse as parse_megatron

    sys.argv = [sys.argv[0], *megatron_flags(sizes)]
    be_one_process()
    skip_dataset_compiler()
    args, config = parse_megatron(device)
    initialize_megatron()
    built = models(args, config)
    where, length = torch.cuda.current_device(), sizes.seq_length
    tokens = torch.randint(0, sizes.vocab_size - 1, (sizes.batch, length)).to(where)
    mask = None  # as in training, attention masks by itself if the data brings no mask
    if args.create_attention_mask_in_dataloader:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=where).triu(1)
    attention = built["dense"][0].decoder.layers[0].self_attention.core_attention
    batch = (tokens, torch.arange(length, device=where).expand_as(tokens), mask)
    return built, batch, type(attention).__name__


def report(sizes: argparse.Namespace, measured: Any, attention: str) -> dict[str, Any]:
    """Return what the tables show."""
    times, peaks, losses = measured
    tokens = sizes.batch * sizes.seq_length
    variants = {
        name: {
            "ms": 1e3 * float(np.median(values)),
            "p10_ms": 1e3 * float(np.percentile(values, 10)),
            "p90_ms": 1e3 * float(np.percentile(values, 90)),
            "tokens_per_second": tokens / float(np.median(values)),
            "peak_gib_above_weights": peaks[name] / (1 << 30),
            "loss": losses[name],
        }
        for name, values in times.items()
    }
    pairs = [("topk", "dense"), ("topk, no statistics", "dense"), ("topk", "topk, no statistics")]
    differences = [compare(times, *pair) for pair in pairs]
    first, _, statistics = differences
    headline = (
        f"TopK {first['mean']:+.2%} [{first['interval'][0]:+.2%}, {first['interval'][1]:+.2%}] of"
        f" the dense step of {variants['dense']['ms']:.1f} ms; statistics {statistics['mean']:+.2%}"
    )
    shape = {key: value for key, value in vars(sizes).items() if key != "output"}
    rounds = len(times["dense"])
    if rounds < FEWEST_ROUNDS:
        headline += f" (only {rounds} rounds)"
    facts = {"headline": headline, "rounds": rounds, "sizes": shape, "attention": attention}
    return facts | {"variants": variants, "differences": differences}


def main() -> None:
    """Measure, write and print."""
    sizes = parse()
    if not torch.cuda.is_available():
        print("train_step: no GPU here; timing the CPU", file=sys.stderr)
        torch.set_num_threads(1)
    built, batch, attention = prepare(sizes)
    facts = report(sizes, measure(built, batch, sizes), attention)
    sizes.output.write_text(json.dumps(facts, indent=1))
    print(facts["headline"])


if __name__ == "__main__":
    main()
