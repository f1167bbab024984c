"""The runs: rungs of the ladder, variants of the model (a file of flags each), and seeds."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.ladder.rungs import BRANCHES, COOLDOWN, RUNGS, Rung
from topk_megatron.plan.command_lines import read_flags

HERE = Path(__file__).resolve().parent
TWIN = "dense"  # the variant that all others are compared with


@dataclass(frozen=True)
class Run:
    """One model of the ladder, with the branches that cool down earlier.

    Attributes:
        rung: Its rung.
        variant: The name of its file.
        about: The first line of the file.
        seed: The seed of the initial weights and of the order of the text.
        flags: Everything that decides the weights, except the schedule's length.
        directory: Its folder, named by a hash of flags and data, so that an existing folder holds
            exactly the model that would be trained.
    """

    rung: Rung
    variant: str
    about: str
    seed: int
    flags: tuple[str, ...]
    directory: Path

    @property
    def name(self) -> str:
        """Depth, variant and seed."""
        return f"{self.rung.depth}-{self.variant}-seed-{self.seed}"

    def flag(self, name: str) -> str:
        """Return the value of a flag, the last one if it is given twice."""
        return value_of(self.flags, name)

    @property
    def k(self) -> int:
        """Neurons kept on the residual stream; where that is dense, neurons recorded: H / 16."""
        if "--topk-k" in self.flags:
            return int(self.flag("--topk-k"))
        return int(self.flag("--hidden-size")) // 16

    def legs(self) -> list["Leg"]:
        """Return the training as a whole, and then its branches."""
        whole = Leg(self, 1.0)
        return [whole, *(Leg(self, fraction) for fraction in BRANCHES)]


@dataclass(frozen=True)
class Leg:
    """A training to its end: the whole (fraction 1), or a branch that cools down earlier."""

    run: Run
    fraction: float

    @property
    def directory(self) -> Path:
        """The folder of this leg."""
        return self.run.directory / ("whole" if self.fraction == 1 else f"{self.fraction:g}")

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.directory / "checkpoints"

    @property
    def steps(self) -> int:
        """The step at which it ends."""
        return round(self.run.rung.steps * self.fraction)

    @property
    def cooldown(self) -> int:
        """The steps over which the learning rate falls, the last ones."""
        return round(self.steps * COOLDOWN)

    def schedule(self) -> list[str]:
        """Return the flags of the schedule."""
        lengths = {
            "--train-iters": self.steps,
            "--lr-decay-iters": self.steps,
            "--lr-wsd-decay-iters": self.cooldown,
        }
        return [str(word) for item in lengths.items() for word in item]


def value_of(flags: Sequence[str], name: str) -> str:
    """Return the value of a flag, the last one if it is given twice."""
    return flags[len(flags) - flags[::-1].index(name)]


def last_of_each(flags: Sequence[str]) -> list[str]:
    """Return each flag once, at its first place with its last values."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in flags:
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return [word for flag, values in found.items() for word in (flag, *values)]


def digest_of(parts: Iterable[str]) -> str:
    """Return ten digits that name what these words decide."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def hash_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of all files' bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def make_grid(
    directory: Path,
    data_hash: str,
    depths: Sequence[int],
    variants: Sequence[str],
    seeds: Sequence[int],
) -> list[Run]:
    """Return the runs, the cheapest rung first and seed by seed.

    Args:
        directory: The folder of all runs.
        data_hash: The hash of the dataset and the tokenizer.
        depths: Depths of the rungs.
        variants: Names of files in ``variants/``.
        seeds: Seeds.

    Raises:
        SystemExit: If there is no such rung or variant.
    """
    for depth in set(depths) - set(RUNGS):
        raise SystemExit(f"error: expected depths of {sorted(RUNGS)}, got {depth}")
    files = {file.stem: file for file in (HERE / "variants").glob("*.args")}
    for name in set(variants) - set(files):
        raise SystemExit(f"error: expected variants of {sorted(files)}, got {name!r}")
    return [
        _make_run(RUNGS[depth], files[name], seed, directory, data_hash)
        for depth in sorted(depths)
        for seed in seeds
        for name in variants
    ]


def _make_run(rung: Rung, file: Path, seed: int, directory: Path, data_hash: str) -> Run:
    about = file.read_text().splitlines()[0].removeprefix("# ")
    words = [*read_flags(HERE / "base.args"), *rung.flags(), *read_flags(file)]
    flags = (*(rung.fill_in(word) for word in words), "--seed", str(seed))
    legs = (f"{rung.steps} {fraction} {COOLDOWN}" for fraction in (1, *BRANCHES))
    digest = digest_of([*flags, *legs, data_hash])
    path = directory / f"{rung.depth}-{file.stem}-seed-{seed}-{digest}"
    return Run(rung, file.stem, about, seed, flags, path)
