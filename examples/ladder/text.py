"""The text: a tokenizer, Megatron datasets, and the excerpts on which models are measured."""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.ladder.rungs import VOCABULARY
from topk_megatron.files import replacing
from topk_megatron.text.reading import read_texts

REPOSITORY = Path(__file__).resolve().parents[2]
EXCERPT = 8000  # characters of each held-out document that are measured


@dataclass(frozen=True)
class Data:
    """The text as files.

    Attributes:
        train: The prefix of the training text.
        tokenizer: The tokenizer.
        excerpts: The beginnings of the held-out documents, as JSON lines.
        valid: The prefix of the excerpts.
    """

    train: Path
    tokenizer: Path
    excerpts: Path
    valid: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that training reads."""
        return Path(f"{self.train}.bin"), Path(f"{self.train}.idx"), self.tokenizer

    def flags(self, index: str) -> list[str]:
        """Return the flags of pretraining that read the text; `index` names a cache."""
        cache = str(self.train.parent / f"index-{index}")
        return [
            *("--train-data-path", str(self.train), "--data-cache-path", cache),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer)),
        ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command of the ladder has."""
    parser.add_argument("--corpus", nargs="+", required=True, help="training text: files or globs")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to measure on, likewise")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "runs" / "ladder")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time")


def prepare(corpus: list[str], held_out: list[str], directory: Path) -> Data:
    """Make what is missing of the files."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("train", "tokenizer.model", "excerpts.jsonl", "valid")
    data = Data(*(directory / name for name in names))
    if not data.tokenizer.exists():
        sizes = ["--vocab-size", str(VOCABULARY), "--max-sentences", "200000"]
        _tool("train_tokenizer.py", "--input", *corpus, "--output", str(data.tokenizer), *sizes)
    if not data.excerpts.exists():
        lines = (
            json.dumps({"text": text[:EXCERPT]}) for text in read_texts(held_out) if text.strip()
        )
        with replacing(data.excerpts) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    for prefix, texts in ((data.train, corpus), (data.valid, [str(data.excerpts)])):
        if not Path(f"{prefix}.idx").exists():
            target = ["--input", *texts, "--output-prefix", str(prefix)]
            model = ["--tokenizer-model", str(data.tokenizer)]
            _tool("preprocess_data.py", *target, *model, "--workers", "2")
    return data


def _tool(name: str, *arguments: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *arguments]
    if subprocess.run(command, cwd=REPOSITORY).returncode:
        sys.exit(f"error: {name} failed")
