"""Tunes learning rate and warm-up of some trials, each by the same budget, and writes TUNING.md.

    python examples/ladder/tune.py --corpus train.jsonl.zst --held-out valid.jsonl.zst

Every trial is trained once with each pair of learning rate and warm-up, at each depth, so that the
budget is the same for a TopK model and for its dense twin. The page has all pairs that were tried.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from examples.ladder.grid import HERE, TWIN, value_of  # noqa: E402
from examples.ladder.rungs import Rung  # noqa: E402
from examples.ladder.text import add_options, prepare  # noqa: E402
from examples.ladder.trials import (  # noqa: E402
    RUNG,
    Found,
    Trial,
    find_results,
    is_twin,
    read_trial,
    run_trials,
    width_of,
)

RUNGS = {4: Rung(4), RUNG.depth: RUNG}
RATES = ("1.6e-3", "2.5e-3", "4e-3", "6.4e-3")
WARMUPS = ("{S/20}", "{S/5}")
Pair = tuple[str, str]  # learning rate, and warm-up in steps


def make_trials(
    names: Sequence[str],
    depths: Sequence[int],
    rates: Sequence[str] = RATES,
    warmups: Sequence[str] = WARMUPS,
) -> list[Trial]:
    """Return the trials of all pairs of learning rate and warm-up."""
    return [
        read_trial(
            HERE / "trials" / f"{name}.args",
            rung=RUNGS[depth],
            more=("--lr", rate, "--lr-warmup-iters", warmup),
        )
        for depth, name, rate, warmup in itertools.product(depths, names, rates, warmups)
    ]


_PAGE = """# Learning rate and warm-up

Written by `examples/ladder/tune.py`; do not edit. Loss in nats a token on held-out text, one seed.
The warm-up is a share of the training. The tax is how far the row's best loss is above the best
one of the dense model of its width, over the pairs that both were trained with; in parentheses,
how far it would be if both used that model's best pair.
"""


def write_page(found: Found, page: Path) -> None:
    """Write a table for each depth, one row for each method and width."""
    losses: dict[int, dict[str, dict[Pair, float]]] = {}
    twins = {width_of(trial): trial.name for trial, _ in found if is_twin(trial)}
    twin_of = {trial.name: twins.get(width_of(trial), "") for trial, _ in found}
    for trial, result in found:
        pair = (value_of(trial.flags, "--lr"), value_of(trial.flags, "--lr-warmup-iters"))
        row = losses.setdefault(trial.number("--num-layers"), {}).setdefault(trial.name, {})
        row[pair] = result["loss"]
    tables = (_table(depth, rows, twin_of) for depth, rows in sorted(losses.items()))
    page.write_text(_PAGE + "".join(tables))


def _table(depth: int, rows: dict[str, dict[Pair, float]], twin_of: dict[str, str]) -> str:
    rung = RUNGS[depth]
    tried = {pair for row in rows.values() for pair in row}
    pairs = sorted(tried, key=lambda pair: (float(pair[0]), int(pair[1])))
    heads = [f"{rate}, {int(steps) / rung.steps:.0%}" for rate, steps in pairs]
    lines = [f"\n## Depth {depth}, {rung.tokens():,} tokens\n"]
    lines.append(f"| method | {' | '.join(heads)} | tax, nats |\n|{'---|' * (len(heads) + 2)}")
    for name, row in rows.items():
        best = min(row.values())
        cells = [f"{row[pair]:.3f}" if pair in row else "" for pair in pairs]
        cells = [f"**{cell}**" if cell == f"{best:.3f}" else cell for cell in cells]
        twin = rows.get(twin_of[name], {})
        tax = "" if name == twin_of[name] else _tax(row, twin)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {tax} |")
    return "\n".join(lines) + "\n"


def _tax(row: dict[Pair, float], twin: dict[Pair, float]) -> str:
    both = sorted(row.keys() & twin.keys())
    if not both:
        return ""
    same = min(both, key=lambda pair: twin[pair])
    tuned = min(row[pair] for pair in both) - twin[same]
    return f"{tuned:+.3f} ({row[same] - twin[same]:+.3f})"


def main() -> None:
    """Run the trainings that have no result, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    names = sorted(file.stem for file in (HERE / "trials").glob("*.args"))
    some: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--trials", default=[TWIN, "anneal", "reads-6"], choices=names, **some)
    parser.add_argument(
        "--depths", default=sorted(RUNGS), choices=sorted(RUNGS), type=int, nargs="+"
    )
    for name, values in (("--rates", RATES), ("--warmups", WARMUPS)):
        parser.add_argument(name, nargs="+", default=values, choices=values, metavar="VALUE")
    args = parser.parse_args()
    data = prepare(args.corpus, args.held_out, args.directory / "data")
    chosen = make_trials(args.trials, args.depths, args.rates, args.warmups)
    run_trials(chosen, data, args.directory / "tuning", args.jobs)
    everything = make_trials([TWIN, *(name for name in names if name != TWIN)], sorted(RUNGS))
    write_page(find_results(everything, data), HERE / "TUNING.md")
    print(f"results: {HERE / 'TUNING.md'}")


if __name__ == "__main__":
    main()
