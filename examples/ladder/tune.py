"""Tunes learning rate and warm-up of some trials, each by the same budget, and writes TUNING.md.

    python examples/ladder/tune.py --corpus train.jsonl.zst --held-out valid.jsonl.zst

Every trial is trained once with each pair of learning rate and warm-up, at each depth. The budget
is therefore the same for a TopK model and for its dense twin.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from examples.ladder.grid import HERE, TWIN, value_of  # noqa: E402
from examples.ladder.rungs import Rung  # noqa: E402
from examples.ladder.text import add_options, prepare  # noqa: E402
from examples.ladder.trials import RUNG, Found, Trial, find_results, read_trial, run_trials  # noqa: E402

RUNGS = {4: Rung(4), RUNG.depth: RUNG}
RATES = ("2.5e-3", "4e-3", "6.4e-3")
WARMUPS = ("{S/20}", "{S/5}")


def make_trials(names: Sequence[str], depths: Sequence[int]) -> list[Trial]:
    """Return the trials of all pairs of learning rate and warm-up."""
    return [
        read_trial(
            HERE / "trials" / f"{name}.args",
            rung=RUNGS[depth],
            more=("--lr", rate, "--lr-warmup-iters", warmup),
        )
        for depth, name, rate, warmup in itertools.product(depths, names, RATES, WARMUPS)
    ]


_PAGE = """# Learning rate and warm-up

Written by `examples/ladder/tune.py`; do not edit. Loss in nats a token on held-out text, one seed.
The warm-up is a share of the training. The last column is how far the row's best loss is above
the best one of the dense twin, and, in parentheses, how far it would be if both used the twin's
best pair.
"""


def write_page(found: Found, page: Path) -> None:
    """Write a table for each depth, one row for each method."""
    losses: dict[int, dict[str, dict[tuple[str, str], float]]] = {}
    for trial, result in found:
        pair = (value_of(trial.flags, "--lr"), value_of(trial.flags, "--lr-warmup-iters"))
        row = losses.setdefault(trial.number("--num-layers"), {}).setdefault(trial.name, {})
        row[pair] = result["loss"]
    page.write_text(_PAGE + "".join(_table(depth, rows) for depth, rows in sorted(losses.items())))


def _table(depth: int, rows: dict[str, dict[tuple[str, str], float]]) -> str:
    rung = RUNGS[depth]
    pairs = [(rate, rung.fill_in(warmup)) for rate, warmup in itertools.product(RATES, WARMUPS)]
    heads = [f"{rate}, {int(steps) / rung.steps:.0%}" for rate, steps in pairs]
    lines = [f"\n## Depth {depth}, {rung.tokens():,} tokens\n"]
    lines.append(f"| method | {' | '.join(heads)} | tax, nats |\n|{'---|' * (len(heads) + 2)}")
    twin = rows.get(TWIN, {})
    for name, row in rows.items():
        best = min(row.values())
        cells = [
            f"**{row[p]:.3f}**" if row[p] == best else f"{row[p]:.3f}" for p in pairs if p in row
        ]
        if len(cells) < len(pairs):
            continue
        tax = ""
        if name != TWIN and len(twin) == len(pairs):
            same = min(pairs, key=lambda pair: twin[pair])
            tax = f"{best - twin[same]:+.3f} ({row[same] - twin[same]:+.3f})"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {tax} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the trainings that have no result, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    names = sorted(file.stem for file in (HERE / "trials").glob("*.args"))
    chosen = {"choices": names, "metavar": "NAME", "nargs": "+"}
    parser.add_argument("--trials", default=[TWIN, "anneal", "reads-6"], **chosen)
    depths = {"choices": sorted(RUNGS), "metavar": "D", "nargs": "+", "type": int}
    parser.add_argument("--depths", default=sorted(RUNGS), **depths)
    args = parser.parse_args()
    data = prepare(args.corpus, args.held_out, args.directory / "data")
    run_trials(make_trials(args.trials, args.depths), data, args.directory / "tuning", args.jobs)
    write_page(
        find_results(make_trials([TWIN, *(n for n in names if n != TWIN)], sorted(RUNGS)), data),
        HERE / "TUNING.md",
    )
    print(f"results: {HERE / 'TUNING.md'}")


if __name__ == "__main__":
    main()
