"""Measures the bytes and step time saved by sparse transport and sparse saved activations.

    python benchmarks/parallel.py bytes        # between two stages, counted at the process group
    python benchmarks/parallel.py loopback     # time of a pipeline step on this machine
    python benchmarks/parallel.py slow-link    # … over 1 Gbit/s between network namespaces (root)
    python benchmarks/parallel.py saved        # activations kept under full recompute

The runs are real trainings with Megatron's loop. Dense and sparse steps alternate within one run,
on the same weights and data, and the table shows medians and the median ratio of neighbouring
steps. The layers are thin (few attention heads, a narrow MLP) so that a step is short on a CPU.
Bytes do not depend on that; shares of time do.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]

WORKER = Path(__file__).with_name("parallel_worker.py")
NAMESPACES = ("topk-bench-0", "topk-bench-1")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
PORT = 29731


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bytes", "loopback", "slow-link", "saved"))
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=None, help="steps of each kind")
    parser.add_argument("--rate", default="1gbit", help="rate of the slow link, in tc's notation")
    return parser.parse_args()


def flags(args: Any, seq: int, repeats: int, layers: int, *more: str) -> list[str]:
    """Return Megatron's flags for a thin model on mock data."""
    settings = {
        "num-layers": layers, "hidden-size": args.hidden_size, "num-attention-heads": 4,
        "kv-channels": 16, "ffn-hidden-size": 64, "seq-length": seq,
        "max-position-embeddings": seq, "position-embedding-type": "rope",
        "normalization": "RMSNorm", "attention-dropout": 0, "hidden-dropout": 0,
        "micro-batch-size": 1, "global-batch-size": 4, "train-iters": 2 * repeats + 4,
        "lr": "1e-4", "eval-iters": 0, "tokenizer-type": "NullTokenizer", "vocab-size": 511,
        "topk-k": args.k, "num-workers": 0,
    }  # fmt: skip
    named = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    switches = ["--swiglu", "--disable-bias-linear", "--mock-data", "--no-topk-metrics"]
    return [*named, *switches, *more]


def launch(ranks: int, arguments: list[str]) -> list[list[dict[str, Any]]]:
    """Run the worker on this machine, and return each rank's records."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as directory:
        command = [*launcher, f"--nproc-per-node={ranks}", str(WORKER), *arguments]
        done = subprocess.run(command, env=environment(directory), capture_output=True, text=True)
        return records(done.returncode, done.stdout + done.stderr, Path(directory), ranks)


def environment(directory: str, **more: str) -> dict[str, str]:
    """Return the environment of a worker."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOPK_BENCHMARK": directory}
    return {**os.environ, **own, **more}


def records(code: int, output: str, directory: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """Read the ranks' records; if the worker failed, print its output and exit."""
    if code != 0:
        sys.exit(f"the worker failed:\n{output[-4000:]}")
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def per_step(steps: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the values of dense steps and of sparse steps."""
    return (
        [step[key] for step in steps if not step["sparse"]],
        [step[key] for step in steps if step["sparse"]],
    )


def measure_bytes(args: Any) -> None:
    """Print the table of bytes per microbatch."""
    print(f"{'dtype':10s}{'direction':12s}{'dense':>12s}{'sparse':>12s}{'times fewer':>13s}")
    for dtype, more in (("bfloat16", ["--bf16"]), ("float32", [])):
        pipeline = ["--pipeline-model-parallel-size", "2", "--topk-layers", "0"]
        ranks = launch(
            2, flags(args, args.seq_length or 256, 1, 2, *pipeline, "--topk-sparse-p2p", *more)
        )
        for name, steps in zip(("forward", "backward"), ranks, strict=True):
            dense, sparse = (
                values[0] / steps[0]["microbatches"] for values in per_step(steps, "sent_bytes")
            )
            print(f"{dtype:10s}{name:12s}{dense:12.0f}{sparse:12.0f}{dense / sparse:13.2f}")


def print_times(ranks: list[list[dict[str, Any]]], repeats: int) -> None:
    """Print median step times and the median ratio of neighbouring steps."""
    dense, sparse = per_step(ranks[0], "seconds")
    ratios = [a / b for a, b in zip(sparse, dense, strict=True)]
    low, high = (
        statistics.quantiles(ratios, n=4)[0::2] if repeats > 2 else (min(ratios), max(ratios))
    )
    print(f"{'steps':10s}{'median ms per step':>18s}{'ratio to dense':>16s}")
    print(f"{'dense':10s}{1e3 * statistics.median(dense):18.1f}{1:16.3f}")
    print(
        f"{'sparse':10s}{1e3 * statistics.median(sparse):18.1f}{statistics.median(ratios):16.3f}"
        f"   (quartiles {low:.3f} to {high:.3f})"
    )


def measure_time(args: Any) -> None:
    """Measure step time over loopback."""
    repeats = args.repeats or 8
    pipeline = ["--pipeline-model-parallel-size", "2", "--topk-layers", "0", "--topk-sparse-p2p"]
    print_times(launch(2, flags(args, args.seq_length or 512, repeats, 2, *pipeline)), repeats)


@contextlib.contextmanager
def slow_link(rate: str) -> Iterator[None]:
    """Connect two network namespaces by a veth pair, with both ends limited to `rate`."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for namespace in NAMESPACES:
            ip("netns", "add", namespace)
        first, second = ("netns", NAMESPACES[0]), ("netns", NAMESPACES[1])
        ip("link", "add", "veth0", *first, "type", "veth", "peer", "name", "veth0", *second)
        for namespace, address in zip(NAMESPACES, ADDRESSES, strict=True):
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", namespace, "link", "set", "veth0", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            limit = f"tc qdisc add dev veth0 root tbf rate {rate} burst 256kb latency 50ms"
            subprocess.run(["ip", "netns", "exec", namespace, *limit.split()], check=True)
        yield
    finally:
        for namespace in NAMESPACES:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def measure_slow_link(args: Any) -> None:
    """Measure step time between two namespaces that act as hosts."""
    repeats = args.repeats or 8
    pipeline = ["--pipeline-model-parallel-size", "2", "--topk-layers", "0", "--topk-sparse-p2p"]
    arguments = flags(args, args.seq_length or 512, repeats, 2, *pipeline)
    with tempfile.TemporaryDirectory() as directory, slow_link(args.rate):
        shared = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "veth0"}
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, str(WORKER), *arguments],
                env=environment(directory, **shared, RANK=str(rank)),
                stdout=(Path(directory) / f"log{rank}").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, namespace in enumerate(NAMESPACES)
        ]
        try:
            code = max(abs(process.wait(900)) for process in ranks)
        finally:
            for process in ranks:
                process.kill()
        output = "".join((Path(directory) / f"log{rank}").read_text()[-2000:] for rank in (0, 1))
        print_times(records(code, output, Path(directory), 2), repeats)


def measure_saved(args: Any) -> None:
    """Measure the bytes that 8 layers keep under full recompute, and step time."""
    repeats = args.repeats or 6
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    more = [*recompute.split(), "--topk-layers", "all", "--topk-sparse-save", "--bf16"]
    # Otherwise each step also keeps a mask of 1 MB besides hidden states of 4 MB; the attention
    # makes its own mask.
    more.append("--no-create-attention-mask-in-dataloader")
    seq = args.seq_length or 1024
    alone = launch(1, flags(args, seq, repeats, 8, *more))
    pipeline = ["--pipeline-model-parallel-size", "2", "--topk-sparse-p2p"]
    second = launch(2, flags(args, seq, 1, 16, *more, *pipeline))[1]
    print(f"{'kept per microbatch':42s}{'dense':>12s}{'sparse':>12s}{'times fewer':>13s}")
    print_kept("8 layers, TopK outputs", alone[0], "kept_topk_bytes")
    print_kept("8 layers, all they keep", alone[0], "kept_bytes")
    print_kept("8 layers of a second stage, all they keep", second, "kept_bytes")
    print_times(alone, repeats)


def print_kept(name: str, steps: list[dict[str, Any]], key: str) -> None:
    """Print one row of bytes."""
    dense, sparse = (values[0] / steps[0]["microbatches"] for values in per_step(steps, key))
    print(f"{name:42s}{dense:12.0f}{sparse:12.0f}{dense / sparse:13.2f}")


def main() -> None:
    """Print one table."""
    args = parse()
    print(f"# {platform.platform()}, {platform.machine()}, torch {torch.__version__}")
    print(f"# {vars(args)}")
    {
        "bytes": measure_bytes,
        "loopback": measure_time,
        "slow-link": measure_slow_link,
        "saved": measure_saved,
    }[args.what](args)


if __name__ == "__main__":
    main()
