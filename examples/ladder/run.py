"""The ladder: the same models at five sizes, with and without TopK, trained, measured, fitted.

    python examples/ladder/run.py --corpus train.jsonl.zst --held-out valid.jsonl.zst

Every run is kept under a hash of its flags and data, so that the command continues where it was
stopped, at any moment.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from examples.ladder.grid import TWIN, hash_of, make_grid  # noqa: E402
from examples.ladder.measure import measure, result_of  # noqa: E402
from examples.ladder.rungs import VOCABULARY  # noqa: E402
from examples.ladder.training import Data, train_all  # noqa: E402
from topk_megatron.files import replacing  # noqa: E402
from topk_megatron.text.reading import read_texts  # noqa: E402

EXCERPT = 8000  # characters of each held-out document that are measured


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", nargs="+", required=True, help="training text: files or globs")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to measure on, likewise")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "runs" / "ladder")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6, 8], metavar="D")
    parser.add_argument("--variants", nargs="+", default=[TWIN, "anneal"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time")
    return parser.parse_args()


def main() -> None:
    """Run every step that is not done yet."""
    args = parse()
    data = prepare(args.corpus, args.held_out, args.directory / "data")
    runs = make_grid(args.directory, hash_of(data.files), args.depths, args.variants, args.seeds)
    missing = [run for run in runs if not result_of(run).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are trained and measured", flush=True)
    train_all(missing, data, args.jobs, lambda run: measure(run, data))


def prepare(corpus: list[str], held_out: list[str], directory: Path) -> Data:
    """Train a tokenizer on the text, tokenize it and cut the held-out text, unless that is done."""
    directory.mkdir(parents=True, exist_ok=True)
    data = Data(*(directory / name for name in ("train", "tokenizer.model", "excerpts.jsonl")))
    sizes = ["--vocab-size", str(VOCABULARY), "--max-sentences", "200000"]
    if not data.tokenizer.exists():
        _tool("train_tokenizer.py", "--input", *corpus, "--output", str(data.tokenizer), *sizes)
    if not Path(f"{data.train}.idx").exists():
        texts = ["--input", *corpus, "--output-prefix", str(data.train)]
        model = ["--tokenizer-model", str(data.tokenizer)]
        _tool("preprocess_data.py", *texts, *model, "--workers", "2")
    if not data.excerpts.exists():
        lines = (
            json.dumps({"text": text[:EXCERPT]}) for text in read_texts(held_out) if text.strip()
        )
        with replacing(data.excerpts) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    return data


def _tool(name: str, *arguments: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *arguments]
    if subprocess.run(command, cwd=REPOSITORY).returncode:
        sys.exit(f"error: {name} failed")


if __name__ == "__main__":
    main()
