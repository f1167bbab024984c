"""What recording costs next to the plain forward pass, and how the cost grows with the tokens.

    python benchmarks/record.py [--tokens 65536 --repeats 5]      ratios, interleaved
    python benchmarks/record.py --scaling 250000 500000 1000000   seconds and peak memory by size

The model is the quickstart's (6 layers, H = 256, k = 32 at layers 0 to 3, 4,096 tokens) with random
weights, or an exported folder given with --model. Tokens are drawn at random by Zipf's law. Plain
passes and recordings take turns; the table holds medians.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topk_megatron.analysis.corpus import Corpus
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.sources import make_source
from topk_megatron.hf.model import OpenModel, open_model

SEQ_LENGTH = 256


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="exported folder instead of random weights")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a forward pass")
    parser.add_argument("--scaling", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


class _Words:
    """As much of a tokenizer as `record` needs."""

    def __len__(self) -> int:
        return 4096

    all_special_ids = ()

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"▁{number}" for number in ids]


def quickstart_folder(directory: Path, layers: list[int]) -> OpenModel:
    """Return the quickstart's model with random weights, which are never saved."""
    from topk_megatron.hf.modeling.modeling_topk import TopKLMConfig, TopKLMForCausalLM

    topk = {"site": "residual", "k": 32, "layers": layers, "mode": "value"}
    torch.manual_seed(0)
    config = TopKLMConfig(
        topk={**topk, "mlp_k": None, "mlp_groups": None},
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=SEQ_LENGTH,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.save_pretrained(directory)
    folder = open_model(directory, device="cpu")
    model = TopKLMForCausalLM(config).eval().requires_grad_(False)
    folder.__dict__.update(model=model, tokenizer=_Words())
    return folder


def make_corpus(tokens: int, vocab_size: int) -> Corpus:
    """Draw tokens by Zipf's law, in documents of 5,000 tokens."""
    weights = 1 / np.arange(1, vocab_size + 1)
    ids = np.random.default_rng(0).choice(vocab_size, tokens, p=weights / weights.sum())
    starts = np.append(np.arange(0, tokens, 5000), tokens)
    return Corpus("random", "text", ids.astype(np.uint16), starts)


def plain(folder: OpenModel, corpus: Corpus, batch: int, *, logits: bool) -> float:
    """Return the seconds of the model's own forward pass over the corpus."""
    model = folder.model if logits else folder.model.model
    count = len(corpus.tokens) // SEQ_LENGTH * SEQ_LENGTH
    tokens = torch.from_numpy(corpus.tokens[:count].astype(np.int64)).view(-1, SEQ_LENGTH)
    started = time.perf_counter()
    with torch.inference_mode():
        for part in tokens.split(batch):
            model(part, use_cache=False)
    return time.perf_counter() - started


def recording(folder: OpenModel, corpus: Corpus, batch: int, directory: Path, raw: bool) -> Any:
    """Return the seconds of a whole recording, with merge and manifest, and its speed.json."""
    config = RecordConfig(
        study=directory, run="run", seq_length=SEQ_LENGTH, batch_size=batch, raw=raw, overwrite=True
    )
    started = time.perf_counter()
    done = record(make_source(folder), corpus, config)
    seconds = time.perf_counter() - started
    return seconds, done.speed


def compare(args: argparse.Namespace, directory: Path) -> None:
    """Print speeds and their ratios to the plain forward pass."""
    folder = open_model(args.model) if args.model else quickstart_folder(directory, [0, 1, 2, 3])
    corpus = make_corpus(args.tokens // SEQ_LENGTH * SEQ_LENGTH, folder.vocab_size)
    names = ("plain, no logits", "plain", "aggregates", "aggregates and raw")
    times: dict[str, list[float]] = {name: [] for name in names}
    merged: list[float] = []
    bytes_per_token = 0.0
    plain(folder, corpus, args.batch, logits=True)
    for _ in range(args.repeats):
        times[names[0]].append(plain(folder, corpus, args.batch, logits=False))
        times[names[1]].append(plain(folder, corpus, args.batch, logits=True))
        for name, raw in ((names[2], False), (names[3], True)):
            total, speed = recording(folder, corpus, args.batch, directory, raw)
            times[name].append(speed["seconds"])
            merged.append(total - speed["seconds"])
            bytes_per_token = speed["raw_bytes_per_token"] or bytes_per_token
    print(f"{'pass':<22}{'tokens/s':>10}{'of plain':>10}{'of plain, no logits':>21}")
    for name in names:
        shares = [
            statistics.median(p / t for p, t in zip(times[base], times[name], strict=True))
            for base in (names[1], names[0])
        ]
        rate = len(corpus.tokens) / statistics.median(times[name])
        print(f"{name:<22}{rate:>10,.0f}{shares[0]:>10.3f}{shares[1]:>21.3f}")
    print(f"raw: {bytes_per_token:,.0f} bytes/token")
    print(f"merge of {len(corpus.tokens):,} tokens: {statistics.median(merged):.2f} s")


def one_size(tokens: int, directory: Path) -> None:
    """Print the cost of aggregates and entropies of all six layers, in a process of its own."""
    from topk_megatron.analysis.entropy.results import entropy
    from topk_megatron.analysis.entropy.run import EntropyConfig
    from topk_megatron.analysis.result import write_result

    folder = quickstart_folder(directory, [0, 1, 2, 3, 4, 5])
    corpus = make_corpus(tokens, folder.vocab_size)
    seconds, speed = recording(folder, corpus, 16, directory, False)
    started = time.perf_counter()
    config = EntropyConfig(study=directory, runs=["run"], semantic=False)
    write_result(directory, "entropy", entropy(config))
    entropies = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{tokens:>12,}{seconds:>12.1f}{speed['seconds']:>12.1f}{entropies:>12.1f}"
        f"{1e6 * (seconds + entropies) / tokens:>14.1f}{peak:>10.2f}"
    )


def main() -> None:
    """Print the tables."""
    args = parse()
    if not args.one:
        print(f"# {platform.platform()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
        print(f"# {torch.get_num_threads()} threads, sequences of {SEQ_LENGTH}, batch {args.batch}")
    with tempfile.TemporaryDirectory() as directory:
        if args.one:
            one_size(args.one, Path(directory))
        elif args.scaling:
            columns = ("record s", "of it passes", "entropy s", "us/token", "peak GB")
            print(
                f"{'tokens':>12}"
                + "".join(f"{c:>{12 + 2 * (n == 3)}}" for n, c in enumerate(columns))
            )
            for size in args.scaling:
                subprocess.run([sys.executable, __file__, "--one", str(size)], check=True)
        else:
            compare(args, Path(directory))


if __name__ == "__main__":
    main()
