"""Runs the trials of new methods on one small model, and writes TRIALS.md.

    python examples/ladder/trials.py --corpus train.jsonl.zst --held-out valid.jsonl.zst

A trial is a file of flags in ``trials/``. Its first comments say what it is, which class of
`arms.py` it uses, why it is tried and what was predicted before it ran. Results are kept in
``trials/results`` under a hash of all that decides them, and a trial that has one does not run.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from examples.ladder.grid import HERE, TWIN, Leg, Run, digest_of, hash_of, last_of_each, value_of  # noqa: E402
from examples.ladder.rungs import Rung  # noqa: E402
from examples.ladder.text import Data, add_options, prepare  # noqa: E402
from examples.ladder.training import LOG_INTERVAL, run_on_one_thread  # noqa: E402
from topk_megatron.plan.command_lines import read_flags  # noqa: E402

RUNG = Rung(6, ratio=6)  # about 1,000 steps: six minutes on one core
EVALUATED = 50  # batches
_NOTES = ("arm", "reason", "predicted")


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: The name of its file.
        about: The file's first line.
        notes: Its arm, its reason, and what was predicted.
        flags: Everything that decides the weights.
    """

    name: str
    about: str
    notes: dict[str, str]
    flags: tuple[str, ...]

    def number(self, flag: str) -> int:
        """Return the value of a flag, the last one if it is given twice."""
        return int(value_of(self.flags, flag))


def read_trial(file: Path, seed: int = 1, rung: Rung = RUNG, more: Sequence[str] = ()) -> Trial:
    """Read a trial's file.

    Args:
        file: The file.
        seed: The seed of the initial weights and of the order of the text.
        rung: The sizes and the length of the training.
        more: Flags that replace those of the file.

    Raises:
        SystemExit: If a note is missing.
    """
    lines = [line.removeprefix("# ") for line in file.read_text().splitlines() if line[:1] == "#"]
    notes = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    if missing := set(_NOTES) - notes.keys():
        raise SystemExit(f"error: {file} has no line '# {min(missing)}: …'")
    leg = Leg(Run(rung, file.stem, lines[0], seed, (), Path()), 1.0)
    words = [*read_flags(HERE / "base.args"), *rung.flags(), *read_flags(file), *leg.schedule()]
    words += ["--seed", str(seed), "--eval-iters", str(EVALUATED), "--eval-interval", "1000000"]
    flags = tuple(rung.fill_in(word) for word in last_of_each([*words, *more]))
    return Trial(file.stem, lines[0], notes, flags)


Found = list[tuple[Trial, dict[str, Any]]]


def run_trials(trials: Sequence[Trial], data: Data, directory: Path, jobs: int) -> None:
    """Run the trials that have no result, several at a time, and print a line about each."""

    def work(trial: Trial) -> str:
        return _run(trial, result_of(trial, data), data, directory)

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(work, trials):
            print(line, flush=True)


def find_results(trials: Sequence[Trial], data: Data) -> Found:
    """Return the trials that have a result, each with it."""
    targets = ((trial, result_of(trial, data)) for trial in trials)
    return [(trial, json.loads(file.read_text())) for trial, file in targets if file.exists()]


def result_of(trial: Trial, data: Data) -> Path:
    """Return the file of a trial's result."""
    parts = [trial.notes["arm"], *trial.flags, _hash_of(data)]
    return HERE / "trials" / "results" / f"{trial.name}-{digest_of(parts)}.json"


@functools.cache
def _hash_of(data: Data) -> str:
    return hash_of([*data.files, Path(f"{data.valid}.bin")])


def _run(trial: Trial, target: Path, data: Data, directory: Path) -> str:
    """Train one model under its arm, unless that is done; return a line about it."""
    if target.exists():
        return f"{trial.name}: {json.loads(target.read_text())['loss']:.4f} (known)"
    directory.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(exist_ok=True)
    command = [
        *(sys.executable, "-m", "examples.ladder.trial", trial.notes["arm"], str(target)),
        *trial.flags,
        *data.flags(f"trial-{target.stem}"),
        *("--valid-data-path", str(data.valid), "--log-interval", str(LOG_INTERVAL)),
    ]
    run_on_one_thread(command, directory / f"{target.stem}.log", f"the trial {trial.name}")
    return f"{trial.name}: {json.loads(target.read_text())['loss']:.4f}"


@dataclass(frozen=True)
class Summary:
    """What a result says.

    Attributes:
        loss: Nats a token, on held-out text.
        mean: Mean token entropy of the neurons with 50 activations or more, in bits.
        weighted: Mean token entropy over activations, in bits.
        silent: Share of neurons that never fired.
    """

    loss: float
    mean: float
    weighted: float
    silent: float


def summarise(result: dict[str, Any]) -> Summary:
    """Return the means over all layers."""
    pairs = [
        (count, entropy)
        for layer in result["neurons"].values()
        for count, entropy in zip(layer["activations"], layer["token_entropy"], strict=True)
    ]
    known = [entropy for count, entropy in pairs if count >= 50]
    total = sum(count for count, _ in pairs)
    silent = [layer["silent"] for layer in result["neurons"].values()]
    return Summary(
        result["loss"],
        sum(known) / len(known),
        sum(count * entropy for count, entropy in pairs) / total,
        sum(silent) / len(silent),
    )


_PAGE = """# Trials

Written by `examples/ladder/trials.py`; do not edit. Every model has {parameters:,} parameters
in its layers and was trained on {tokens:,} tokens, on the same batches, with one seed.
Differences below 0.01 nats mean nothing.

The tax is how far the loss, and the perplexity, are above those of the dense model of the same
width. Token entropies are in bits and of the k largest neurons of what the next layer's attention
reads: the mean over neurons, and the mean over activations beside the lowest that is possible at
this k and H ([why](../../docs/design/0013-tax.md)).

| {head} |
|{rule}
"""
_HEAD = (
    *("trial", "H", "k", "loss, nats", "tax, nats", "tax, %"),
    *("entropy, neurons", "entropy, activations", "floor", "silent"),
)


def write_page(found: Found, page: Path) -> None:
    """Write the table of all results, and what each trial is."""
    twins = {width_of(t): r["loss"] for t, r in found if is_twin(t)}
    lines = []
    for trial, result in found:
        one, width, k = summarise(result), width_of(trial), trial.number("--topk-k")
        tax = ("", "")
        if not is_twin(trial) and width in twins:
            nats = one.loss - twins[width]
            tax = (f"{nats:+.3f}", f"{100 * math.expm1(nats):+.1f}")
        floor = result["entropy_of_tokens"] - math.log2(width / k)
        numbers = (f"{one.mean:.2f}", f"{one.weighted:.2f}", f"{floor:.2f}", f"{one.silent:.0%}")
        cells = (f"`{trial.name}`", str(width), str(k), f"{one.loss:.3f}", *tax, *numbers)
        lines.append(f"| {' | '.join(cells)} |")
    head = {"head": " | ".join(_HEAD), "rule": "---|" * len(_HEAD)}
    parts = [_PAGE.format(parameters=RUNG.parameters, tokens=RUNG.tokens(), **head)]
    parts[0] += "\n".join(lines)
    for trial, _ in found:
        notes = "\n".join(f"- {name}: {trial.notes[name]}" for name in _NOTES)
        parts.append(f"## {trial.name}\n\n{trial.about}\n\n{notes}")
    page.write_text("\n\n".join(parts) + "\n")


def is_twin(trial: Trial) -> bool:
    """Return whether nothing is masked, neither on the stream nor inside the MLP."""
    return trial.notes["arm"] == TWIN and "--topk-mlp-k" not in trial.flags


def width_of(trial: Trial) -> int:
    """Return H."""
    return trial.number("--hidden-size")


def main() -> None:
    """Run the trials that have no result, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--trials", nargs="+", metavar="NAME", help="which, in this order (default: all)"
    )
    args = parser.parse_args()
    data = prepare(args.corpus, args.held_out, args.directory / "data")
    files = sorted((HERE / "trials").glob("*.args"), key=lambda file: (file.stem != TWIN, file))
    everything = [read_trial(file) for file in files]
    by_name = {trial.name: trial for trial in everything}
    if unknown := set(args.trials or ()) - by_name.keys():
        sys.exit(f"error: there is no {HERE / 'trials' / min(unknown)}.args")
    chosen = [by_name[name] for name in args.trials or by_name]
    run_trials(chosen, data, args.directory / "trials", args.jobs)
    write_page(find_results(everything, data), HERE / "TRIALS.md")
    print(f"results: {HERE / 'TRIALS.md'}")


if __name__ == "__main__":
    main()
