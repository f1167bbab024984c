"""From raw text to a TopK language model, its dense twin, and their neurons.

    make quickstart        (or: python examples/quickstart/run.py --help)

Fetches Shakespeare's plays, trains a tokenizer, builds a Megatron dataset, trains both models under
torchrun on the same tokens in the same order, converts both to Hugging Face models, measures them
on held-out plays, samples from them and studies their neurons. Training takes two ranks, or one on
a machine with one GPU. Trained and converted models are kept; delete the working directory to start
from scratch. Every printed number comes from this run.
"""

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from plays import (  # noqa: E402
    REPOSITORY,
    count_ranks,
    fetch_plays,
    held_out,
    prepare_data,
    run,
    step,
    tool,
)
from report import Model, compare, plot_losses  # noqa: E402

MODEL = (
    "--num-layers 6 --hidden-size 256 --num-attention-heads 8 --seq-length 256 "
    "--max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0"
)
TRAINING = (
    "--micro-batch-size 4 --global-batch-size 8 --lr 1.5e-3 --min-lr 1.5e-4 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 --adam-beta2 0.95 "
    "--clip-grad 1.0 --split 90,10,0 --eval-iters 60 --log-interval 10 --num-workers 0 "
    "--use-distributed-optimizer"
)
VARIANTS = {
    "topk": "--topk-k 32 --topk-layers all,-2 --topk-anneal exponential",
    "dense": "--topk-layers none",
}
PROMPT = "**ROMEO**  \n"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "runs" / "quickstart")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 2,048 tokens")
    parser.add_argument("--sample-tokens", type=int, default=80, help="tokens of each sample")
    return parser.parse_args()


def main() -> None:
    """Run every step."""
    args = parse()
    args.directory.mkdir(parents=True, exist_ok=True)
    check_settings(args.directory, args.steps)
    started = time.perf_counter()
    plays = fetch_plays(args.directory)
    dataset, tokenizer = prepare_data(args.directory, plays)
    models = []
    for name, flags in VARIANTS.items():
        seconds = train(args, name, flags, dataset, tokenizer)
        models.append(Model(name, args.directory / name, seconds))
    folders = {name: convert(args.directory, name) for name in VARIANTS}
    measured = evaluate(args.directory, list(folders.values()), held_out(plays)[-1])
    samples = {name: sample(folder, args.sample_tokens) for name, folder in folders.items()}
    report = study(args.directory, folders, dataset)
    neuron = draw_neuron(args.directory, folders["topk"], dataset)
    picture = plot_losses(models, args.directory / "loss.png")
    print(compare(models, samples, PROMPT))
    print(f"\n== the converted models on one of these plays and two tasks\n\n{measured}")
    print(f"loss curves: {picture}")
    print(f"one neuron: {neuron}")
    print(f"neurons (open it in a browser): {report}")
    print(f"whole quickstart: {time.perf_counter() - started:.0f} s")


def check_settings(directory: Path, steps: int) -> None:
    """Refuse a directory whose models were trained with other settings.

    Raises:
        SystemExit: If the directory records other settings.
    """
    record = directory / "settings.txt"
    flags = [f"--steps {steps}", MODEL, TRAINING, *VARIANTS.values()]
    settings = "\n".join(flags) + "\n"
    if record.exists() and record.read_text() != settings:
        sys.exit(
            f"error: {directory} holds models that were trained with other settings, listed in "
            f"{record}; give the same --steps or another --directory, or delete it"
        )
    record.write_text(settings)


def train(
    args: argparse.Namespace, name: str, variant: str, dataset: Path, tokenizer: Path
) -> float | None:
    """Train one model, resuming if it was interrupted.

    Returns:
        Seconds of training, None if the model existed already.
    """
    directory = args.directory / name
    if (directory / f"iter_{args.steps:07d}" / "metadata.json").exists():
        step(f"the {name} model is trained already")
        return None
    ranks = count_ranks()
    where = "the GPU" if ranks == 1 else f"{ranks} data-parallel ranks"
    step(f"training the {name} model: {args.steps} steps on {where}")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks)),
        str(REPOSITORY / "pretrain_topk_gpt.py"),
        *MODEL.split(),
        *TRAINING.split(),
        *variant.split(),
        # Evaluate once, after the last step.
        *("--train-iters", str(args.steps), "--eval-interval", str(args.steps + 1)),
        *("--data-path", str(dataset), "--data-cache-path", str(args.directory / "index-cache")),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)),
        *(
            "--save",
            str(directory),
            "--load",
            str(directory),
            "--save-interval",
            str(max(1, args.steps // 4)),
        ),
        *("--tensorboard-dir", str(directory / "tensorboard"), "--tensorboard-log-interval", "1"),
        "--log-timers-to-tensorboard",
    ]
    print(shlex.join(command[1:]), flush=True)
    started = time.perf_counter()
    directory.mkdir(exist_ok=True)
    run(command, log=directory / "train.log")
    return time.perf_counter() - started


def convert(directory: Path, name: str) -> Path:
    """Convert the model to a Hugging Face folder; return the folder."""
    folder = directory / "hf" / name
    if not folder.is_dir():
        step(f"converting the {name} model to Hugging Face")
        folder.parent.mkdir(exist_ok=True)
        tool("convert_checkpoint.py", "to-hf", "--load", directory / name, "--save", folder)
    return folder


def evaluate(directory: Path, folders: list[Path], play: Path) -> str:
    """Measure the converted models on a play and two small tasks; return the table."""
    step(f"evaluating the converted models on {play.stem} and two tasks")
    tasks = sorted((HERE / "tasks").glob("*.yaml"))
    flags = ["--model", *folders, "--text", play, "--tasks", *tasks, "--limit", 60]
    return tool("evaluate.py", *flags, "--output", directory / "evaluation.json", show=False)


def study(directory: Path, folders: dict[str, Path], dataset: Path) -> Path:
    """Study the neurons on held-out plays: next to the dense twin and its SAEs, and over training.

    Samples are small to save time; docs/analysis.md shows larger ones.

    Returns:
        The report.
    """
    step("studying the neurons")
    trajectory, results = directory / "hf" / "topk-trajectory", directory / "study"
    shutil.rmtree(results, ignore_errors=True)
    shutil.rmtree(trajectory, ignore_errors=True)
    tool(
        "convert_checkpoint.py",
        *("to-hf", "--load", directory / "topk", "--all-iterations", "--save", trajectory),
    )
    where = ("--corpus", dataset, "--study", results)
    held_out = (*where, "--documents=-4:", "--max-tokens", 32768)
    topk, dense = ("--model", folders["topk"]), ("--model", folders["dense"])
    for command in (
        ("record", *topk, *held_out, "--name", "topk"),
        ("record", *dense, *held_out, "--name", "dense", "--k", 32, "--layers", "all,-2"),
        (
            *("sae", *dense, *held_out, "--train-documents=:-4", "--k", 32, "--layers", 2),
            *("--train-tokens", 40960),
        ),
        (
            *("track", *where, "--documents=-4:", "--max-tokens", 16384, "--name", "topk"),
            *("--trajectory", trajectory, "--context-neurons", 0),
        ),
        (
            *("entropy", "--study", results, "--runs", "topk", "dense", "sae-seed-0"),
            *("--semantic-neurons", 16),
        ),
        (
            *("steer", *topk, *where, "--documents=-4:", "--run", "topk", "--sample", 3),
            *("--strengths", 0.5, 1, 2),
        ),
        ("report", "--study", results),
    ):
        tool("analyze.py", *command)
    return results / "report.html"


def draw_neuron(directory: Path, folder: Path, dataset: Path) -> Path:
    """Draw one neuron of the TopK model, as in the README; return the picture."""
    step("drawing a neuron")
    path = directory / "neuron.png"
    script = str(HERE / "neuron_picture.py")
    where = ("--study", directory / "study", "--model", folder, "--corpus", dataset)
    run([sys.executable, script, *map(str, where), "--output", str(path)])
    return path


def sample(folder: Path, tokens: int) -> str:
    """Return a converted model's continuation of the prompt."""
    step(f"sampling from {folder}")
    flags = ["--model", folder, "--prompt", PROMPT, "--tokens", tokens]
    return tool("generate.py", *flags, show=False)


if __name__ == "__main__":
    main()
