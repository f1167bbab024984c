"""The ladder: the same models at five sizes, with and without TopK, trained, measured, fitted.

    python examples/ladder/run.py --corpus train.jsonl.zst --held-out valid.jsonl.zst

Every run is kept under a hash of its flags and data, so that the command continues where it was
stopped, at any moment.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from examples.ladder.grid import TWIN, hash_of, make_grid  # noqa: E402
from examples.ladder.measure import measure, result_of  # noqa: E402
from examples.ladder.text import add_options, prepare  # noqa: E402
from examples.ladder.training import train_all  # noqa: E402


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6, 8], metavar="D")
    parser.add_argument("--variants", nargs="+", default=[TWIN, "anneal"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    return parser.parse_args()


def main() -> None:
    """Run every step that is not done yet."""
    args = parse()
    data = prepare(args.corpus, args.held_out, args.directory / "data")
    runs = make_grid(args.directory, hash_of(data.files), args.depths, args.variants, args.seeds)
    missing = [run for run in runs if not result_of(run).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are trained and measured", flush=True)
    train_all(missing, data, args.jobs, lambda run: measure(run, data))


if __name__ == "__main__":
    main()
