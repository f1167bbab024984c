"""Measure exported models side by side: perplexity on held-out text, and lm-eval tasks.

python tools/evaluate.py --model hf/topk hf/dense --text 'held-out/*.txt' \
    --tasks examples/quickstart/tasks/next_line.yaml --output results.json
"""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topk_megatron.cli import exit_on_user_error
from topk_megatron.errors import ConfigError
from topk_megatron.evaluation.perplexity import perplexity, read_documents
from topk_megatron.evaluation.tasks import evaluate_tasks
from topk_megatron.hf.model import DTYPES, OpenModel, open_model


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, nargs="+", required=True, help="folders; their modeling code runs"
    )
    parser.add_argument("--text", nargs="+", help="text files or globs for perplexity")
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    parser.add_argument("--tasks", nargs="+", help="task files (.yaml) or names known to lm-eval")
    parser.add_argument(
        "--context", type=int, help="tokens per window (default: the model's length)"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens between the starts of windows (default: the context)"
    )
    parser.add_argument("--limit", type=int, help="examples per task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file for the results, as JSON")
    args = parser.parse_args()
    if not args.text and not args.tasks:
        parser.error("nothing to do: give --text, --tasks or both")
    return args


@exit_on_user_error
def main() -> None:
    """Evaluate every model on the same text and tasks, then print one table."""
    args = parse()
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    _check_output(args.output)
    texts = read_documents(args.text, args.json_key) if args.text else []
    results = []
    for directory in args.model:
        # The libraries print while they work; standard output is for the table.
        with contextlib.redirect_stdout(sys.stderr):
            opened = open_model(directory, dtype=args.dtype, device=args.device)
            results.append(_evaluate(opened, texts, args))
    if args.output is not None:
        args.output.write_text(json.dumps({"format_version": 1, "results": results}, indent=2))
    print(table(results))


def _check_output(output: Path | None) -> None:
    if output is not None and not output.resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: the folder does not exist")


def _evaluate(opened: OpenModel, texts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    topk = opened.topk if opened.is_topk else None
    found: dict[str, Any] = {"model": opened.name, "path": str(opened.path), "topk": topk}
    if texts:
        measured = perplexity(
            opened,
            texts,
            context=args.context,
            stride=args.stride,
            batch_size=args.batch_size,
            progress=lambda batches: tqdm(batches, desc=opened.name, unit="batch", leave=False),
        )
        found["perplexity"] = asdict(measured)
    if args.tasks:
        found["tasks"] = evaluate_tasks(
            opened, args.tasks, batch_size=args.batch_size, limit=args.limit
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Return one row per model; accuracies have their standard error."""
    columns: dict[str, list[str]] = {"model": [], "k": []}
    tasks = sorted({name for result in results for name in result.get("tasks", {})})
    for result in results:
        columns["model"].append(result["model"])
        columns["k"].append(str(result["topk"]["k"]) if result["topk"] else "dense")
        if (measured := result.get("perplexity")) is not None:
            loss = "{loss:.4f} [{low:.3f}, {high:.3f}]".format(**measured)
            columns.setdefault("nats per token [95 %]", []).append(loss)
            columns.setdefault("perplexity", []).append(f"{measured['perplexity']:.2f}")
            columns.setdefault("bits per byte", []).append(f"{measured['bits_per_byte']:.4f}")
        for name in tasks:
            metrics = result["tasks"][name]
            metric = "acc" if "acc" in metrics else next(iter(metrics))
            error = metrics.get(f"{metric}_stderr", float("nan"))
            columns.setdefault(f"{name} ({metric})", []).append(
                f"{metrics[metric]:.3f} ± {error:.3f}"
            )
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
