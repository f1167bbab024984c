"""The runs: variants of one model, each a file of flags, each with two seeds."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from topk_megatron.plan.command_lines import read_flags

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2)
K_OF_CENTRE = 16  # of H = 256
# The runs of --fast: enough for every table to have a row, in minutes.
FAST_VARIANTS = ("dense", "topk", "anneal", "mlp")
FAST_STEPS = 24


@dataclass(frozen=True)
class Run:
    """One model to train.

    Attributes:
        variant: The name of its file.
        about: The first line of the file.
        seed: The seed of the initial weights and of the order of the text.
        flags: Everything that decides the weights.
        directory: Its folder, named by a hash of flags and data, so that an existing folder holds
            exactly the model that would be trained.
    """

    variant: str
    about: str
    seed: int
    flags: tuple[str, ...]
    directory: Path

    @property
    def name(self) -> str:
        """Variant and seed, which also name its recording."""
        return f"{self.variant}-seed-{self.seed}"

    def flag(self, name: str) -> str:
        """Return the value of a flag, the last one if it is given twice."""
        place = len(self.flags) - 1 - self.flags[::-1].index(name)
        return self.flags[place + 1]

    @property
    def k(self) -> int:
        """Neurons kept on the residual stream; where that is dense, neurons recorded."""
        return int(self.flag("--topk-k")) if "--topk-k" in self.flags else K_OF_CENTRE

    @property
    def steps(self) -> int:
        """Training steps."""
        return int(self.flag("--train-iters"))


def hash_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of all files' bytes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_grid(directory: Path, data_hash: str, *, fast: bool) -> list[Run]:
    """Return all runs, dense ones first.

    Args:
        directory: The folder of all runs.
        data_hash: The hash of the dataset and the tokenizer.
        fast: Whether to make the short form.
    """
    base = tuple(read_flags(HERE / "base.args"))
    if fast:
        base = (*base, "--train-iters", str(FAST_STEPS))
    files = sorted((HERE / "variants").glob("*.args"), key=lambda f: (f.stem != "dense", f.stem))
    runs = []
    for seed in SEEDS[:1] if fast else SEEDS:
        for file in files:
            if fast and file.stem not in FAST_VARIANTS:
                continue
            about = file.read_text().splitlines()[0].removeprefix("# ")
            flags = (*base, *_shortened(tuple(read_flags(file)), fast), "--seed", str(seed))
            digest = hashlib.sha256("\0".join([*flags, data_hash]).encode()).hexdigest()[:10]
            path = directory / f"{file.stem}-seed-{seed}-{digest}"
            runs.append(Run(file.stem, about, seed, flags, path))
    return runs


def _shortened(flags: tuple[str, ...], fast: bool) -> tuple[str, ...]:
    """Return flags that end annealing half way through the short training too."""
    if not fast or "--topk-anneal-end" not in flags:
        return flags
    return (*flags, "--topk-anneal-end", str(FAST_STEPS // 2))
