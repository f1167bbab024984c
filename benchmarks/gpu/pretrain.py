"""Runs the real pretrain_topk_gpt.py for some seconds, and keeps its losses and times.

    python -m benchmarks.gpu.pretrain slice --seconds 30 --output pretrain.json
    python -m benchmarks.gpu.pretrain corpus --corpus DIR --seconds 60 --output training.json

`slice` trains four layers of the 7B model on mock data, which shows that the real entry runs on a
GPU. `corpus` trains the 100M model on DIR/text.bin and .idx with
DIR/tokenizer.model until the time is over. The losses also go to a CSV file.
"""

import argparse
import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# One line of Megatron's log.
LOGGED = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: ([\d.Ee+-]+)"
)
ANNOUNCED = re.compile(r"^topk_megatron: .*$", re.MULTILINE)
NO_SAVES = ["--eval-iters", "0", "--log-interval"]
# The learning rate does not fall, because nobody knows how many steps will fit.
STEADY = ["--lr-decay-style", "constant", "--lr-warmup-iters", "50"]


def read_flags(name: str) -> list[str]:
    """Return the flags of an argument file in configs/, without its comments."""
    lines = (REPOSITORY / "configs" / f"{name}.args").read_text().splitlines()
    return " ".join(line.split("#")[0] for line in lines).split()


def slice_flags(variant: str) -> list[str]:
    """Return the flags of four layers of the 7B model on one GPU, with mock data."""
    layers = "none" if variant == "dense" else "all"
    return [
        *(*read_flags("7b"), "--num-layers", "4", "--tensor-model-parallel-size", "1"),
        *(
            "--global-batch-size",
            "4",
            "--train-iters",
            "400",
            "--topk-layers",
            layers,
            "--mock-data",
        ),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "32767"),
        *("--transformer-impl", "local", *STEADY, *NO_SAVES, "1"),
    ]


def corpus_flags(corpus: Path, cache: Path) -> list[str]:
    """Return the flags of the 100M model on a tokenised corpus; k is constant."""
    return [
        *(*read_flags("100m"), "--topk-anneal", "constant", "--micro-batch-size", "16"),
        *("--global-batch-size", "64", "--train-iters", "4000", "--split", "100,0,0"),
        *("--data-path", str(corpus / "text"), "--data-cache-path", str(cache)),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(corpus / "tokenizer.model")),
        *("--transformer-impl", "local", *STEADY, *NO_SAVES, "5"),
    ]


def without_sequence_parallel(flags: list[str]) -> list[str]:
    """Drop a flag of several ranks, which one rank refuses."""
    return [flag for flag in flags if flag != "--sequence-parallel"]


def train(flags: list[str], log: Path, seconds: float) -> str:
    """Train until done or until the seconds are over, and return the log."""
    command = [sys.executable, str(REPOSITORY / "pretrain_topk_gpt.py")]
    command += without_sequence_parallel(flags)
    deadline = time.monotonic() + seconds
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return log.read_text(errors="replace")


def summarise(text: str, tokens_per_step: int) -> dict[str, Any]:
    """Return losses, and the median time of a step without the first ones, which compile."""
    found = [(int(n), float(ms), float(loss)) for n, ms, loss in LOGGED.findall(text)]
    if not found:
        last = " | ".join(text.strip().splitlines()[-3:])
        raise SystemExit(f"error: no step was logged; the log ends: {last}")
    settled = [ms for n, ms, _ in found if n > 3] or [ms for _, ms, _ in found]
    step_ms = statistics.median(settled)
    return {
        "steps": found[-1][0],
        "step_ms": step_ms,
        "tokens_per_second": tokens_per_step / step_ms * 1e3,
        "losses": [[n, loss] for n, _, loss in found],
        "announced": ANNOUNCED.findall(text),
    }


def value_of(flags: list[str], name: str) -> int:
    """Return the number behind a flag's last occurrence, which is the one that counts."""
    return int(flags[len(flags) - 1 - flags[::-1].index(name) + 1])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the trainings of one mode, and return their summaries by variant."""
    folder: Path = options.output.parent
    if options.mode == "corpus":
        flags = {"topk": corpus_flags(options.corpus, folder / "index-cache")}
    else:
        flags = {variant: slice_flags(variant) for variant in options.variants}
    runs: dict[str, Any] = {}
    flags = {variant: [*words, *options.more.split()] for variant, words in flags.items()}
    for variant, words in flags.items():
        tokens = value_of(words, "--global-batch-size") * value_of(words, "--seq-length")
        log = folder / f"{options.output.stem}_{variant}.log"
        runs[variant] = summarise(train(words, log, options.seconds / len(flags)), tokens)
        runs[variant]["flags"] = " ".join(without_sequence_parallel(words))
    return runs


def headline(runs: dict[str, Any]) -> str:
    """Return tokens per second and the way of the loss of each variant."""
    parts = []
    for name, found in runs.items():
        first, last = found["losses"][0][1], found["losses"][-1][1]
        rate = f"{found['tokens_per_second']:,.0f} tokens/s"
        parts.append(f"{name}: {rate}, loss {first:.3f} to {last:.3f} in {found['steps']} steps")
    return "; ".join(parts)


def main() -> None:
    """Train, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("slice", "corpus"))
    parser.add_argument("--seconds", type=float, default=30, help="for all runs together")
    parser.add_argument("--corpus", type=Path, help="folder with text.bin, text.idx and tokenizer")
    parser.add_argument(
        "--variants", nargs="+", choices=("topk", "dense"), default=["topk"], help="of slice"
    )
    parser.add_argument("--more", default="", help="flags of pretrain_topk_gpt.py to add")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if options.mode == "corpus" and options.corpus is None:
        parser.error("corpus needs --corpus DIR")
    runs = run(options)
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "step", "loss"])
        writer.writerows([name, *pair] for name, found in runs.items() for pair in found["losses"])
    facts = {"headline": headline(runs), "runs": runs}
    options.output.write_text(json.dumps(facts, indent=1))
    print(facts["headline"])


if __name__ == "__main__":
    main()
