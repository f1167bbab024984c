"""analyze steer: push neurons while a model writes, and measure success and damage."""

import argparse
import re
from pathlib import Path
from typing import Any

from topk_megatron.analysis.options import add_mean_arguments, add_study_argument, positive


def register(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "steer", help="push neurons while the model writes", description=__doc__
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder that was recorded")
    add_study_argument(parser)
    parser.add_argument("--run", dest="name", required=True, help="the recorded run")
    parser.add_argument("--corpus", required=True, help="the text that prompts are taken from")
    parser.add_argument(
        "--documents", metavar="A:B", help="only these documents, as a Python slice"
    )
    parser.add_argument(
        "--neurons",
        nargs="+",
        metavar="LAYER:NEURON",
        help="neurons to push (default: a random sample)",
    )
    parser.add_argument("--sample", type=positive, default=16, help="neurons drawn per layer")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0, 4.0],
        help="how far to push, in multiples of a neuron's largest recorded value",
    )
    parser.add_argument("--samples", type=positive, default=4, help="prompts per push")
    parser.add_argument("--prompt-tokens", type=positive, default=16, help="tokens per prompt")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens to write")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--rows", type=positive, default=128, help="rows per batch")
    add_mean_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Push, measure, write, and print the means."""
    from topk_megatron.analysis.corpus import check_tokenizer, open_corpus
    from topk_megatron.analysis.result import write_result
    from topk_megatron.analysis.steer.results import steer
    from topk_megatron.analysis.steer.run import SteerConfig
    from topk_megatron.analysis.study import open_run
    from topk_megatron.errors import AnalysisError
    from topk_megatron.hf.model import open_model

    if args.temperature < 0:
        raise AnalysisError(f"--temperature must be at least 0, got {args.temperature}")
    config = SteerConfig(
        neurons=None if args.neurons is None else parse_neurons(args.neurons),
        sample=args.sample,
        min_count=args.min_count,
        strengths=tuple(args.strengths),
        samples=args.samples,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        temperature=args.temperature,
        rows=args.rows,
        seed=args.seed,
        bootstrap=args.bootstrap,
    )
    recorded = open_run(args.study, args.name)
    folder = open_model(args.model)
    corpus = open_corpus(args.corpus, lambda: folder.tokenizer, documents=args.documents)
    check_tokenizer(corpus, folder.path, folder.vocab_size)
    result = steer(config, folder, recorded, corpus)
    write_result(args.study, "steer", result)
    for entry in result.claims:
        own, control = entry["rows"]
        print(
            f"{entry['id']}: concept tokens {own['value']:+.4f}, control {control['value']:+.4f}; "
            f"{entry['note']}"
        )


def parse_neurons(texts: list[str]) -> list[tuple[int, int]]:
    """Parse LAYER:NEURON pairs."""
    from topk_megatron.errors import AnalysisError

    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise AnalysisError(f"--neurons takes LAYER:NEURON such as 3:17, got {text!r}")
        found.append((int(match[1]), int(match[2])))
    return found
