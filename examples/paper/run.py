"""The paper's experiments at laptop scale: train, convert, analyse, write RESULTS.md.

    make paper             # an hour and a half on two cores
    make paper-fast        # four variants, one seed, a few steps: every part runs, for tests

Each training run is described by base.args and one file in variants/, and is cached under a hash of
its flags and data: the command continues where it was stopped, and a changed file is trained again.
"""

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]
import deep  # noqa: E402
import measure  # noqa: E402
from grid import Run, hash_of, make_grid  # noqa: E402
from plays import fetch_plays, held_out, prepare_data  # noqa: E402
from results import write_results  # noqa: E402
from training import Data, train_all  # noqa: E402


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "runs" / "paper")
    parser.add_argument("--fast", action="store_true", help="run the short form")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time")
    parser.add_argument(
        "--results", type=Path, help="where RESULTS.md goes (default: here; --fast: the directory)"
    )
    return parser.parse_args()


def main() -> None:
    """Run every step that is not done yet."""
    args = parse()
    started = time.perf_counter()
    args.directory.mkdir(parents=True, exist_ok=True)
    data, plays = prepare(args.directory)
    runs = make_grid(args.directory, hash_of(data.files), fast=args.fast)
    train_all(runs, data, args.jobs)
    tasks = sorted((HERE.parent / "quickstart" / "tasks").glob("*.yaml"))
    amounts = measure.FAST if args.fast else measure.FULL
    study = args.directory / ("study-fast" if args.fast else "study")
    measures = measure.measure_all(runs, plays, tasks, data.dataset, study, amounts, args.jobs)
    studies = study_pairs(runs, data.dataset, args.directory, fast=args.fast)
    command = "make paper-fast" if args.fast else "make paper"
    target = args.results or (args.directory if args.fast else HERE)
    print(f"results: {write_results(runs, measures, studies, target, command)}")
    for report in studies:
        print(f"neurons (open it in a browser): {report / 'report.html'}")
    print(f"whole run: {time.perf_counter() - started:.0f} s")


def prepare(directory: Path) -> tuple[Data, list[Path]]:
    """Make text, tokenizer and dataset as the quickstart does; also return the held-out plays."""
    plays = fetch_plays(directory)
    dataset, tokenizer = prepare_data(directory, plays)
    return Data(dataset, tokenizer), held_out(plays)


def study_pairs(runs: list[Run], dataset: Path, directory: Path, *, fast: bool) -> list[Path]:
    """Run the whole analysis of the centre and its dense twin, for each seed."""
    amounts = deep.FAST if fast else deep.FULL
    found = []
    for topk in (run for run in runs if run.variant == "topk"):
        (dense,) = (run for run in runs if run.variant == "dense" and run.seed == topk.seed)
        found.append(deep.study_pair(topk, dense, dataset, directory, amounts))
    return found


if __name__ == "__main__":
    main()
