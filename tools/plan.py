"""Estimate what a model costs on a cluster: memory, traffic, time, the best layout.

    python tools/plan.py configs/70b.args --gpu h100 --nodes 64 --write runs/70b
    python tools/plan.py --nodes 2 -- --num-layers 32 --hidden-size 4096 --vocab-size 32000 …
    python tools/plan.py --dry-run configs/500b.args

The model comes from an argument file, from pretraining flags after --, or from both (the flags
win). All figures are estimates. --write also writes a script that starts the run. --dry-run builds
every pipeline stage with Megatron's own code, without memory or hardware, and checks parameters,
shards and TopK layers.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from topk_megatron.cli import exit_on_user_error
from topk_megatron.errors import ConfigError
from topk_megatron.plan.assumptions import COMPUTE_EFFICIENCY, GPUS, LINKS, cluster_of
from topk_megatron.plan.command_lines import layout_in, read_flags, shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.report import assumption_table, describe, to_json
from topk_megatron.plan.script import write_script
from topk_megatron.plan.search import search


def parse(words: list[str]) -> argparse.Namespace:
    """Parse the command line before ``--``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", type=Path, nargs="?", help="argument file, such as those in configs/"
    )
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default: h100)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--link",
        default="ndr",
        help=f"between nodes: one of {', '.join(LINKS)}, or GB/s per GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--nvlink",
        type=float,
        help="inside a node, GB/s per GPU in one direction (default: data sheet)",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        help=f"share of the peak that kernels reach (default: {COMPUTE_EFFICIENCY.value})",
    )
    parser.add_argument(
        "--rows", type=int, default=6, help="number of layouts to show (default: 6)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    parser.add_argument("--assumptions", action="store_true", help="print all assumptions and exit")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write NAME.args and NAME.sbatch for the best"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build the layout that the file asks for, instead of planning",
    )
    return parser.parse_args(words)


@exit_on_user_error
def main() -> None:
    """Plan, or build every stage."""
    words, further = _split(sys.argv[1:])
    given = parse(words)
    if given.assumptions:
        print(assumption_table())
        return
    if given.config is None and not further:
        raise ConfigError(
            "no model: give an argument file such as configs/1b.args, or flags after --"
        )
    flags = [*(read_flags(given.config) if given.config else []), *further]
    name = given.config.stem if given.config else "model"
    if given.dry_run:
        _dry_run(name, flags)
    else:
        _plan(given, name, flags)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return our words, and the pretraining flags after ``--``."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def _plan(given: argparse.Namespace, name: str, flags: list[str]) -> None:
    shape = shape_of(flags)
    cluster = cluster_of(
        given.gpu,
        given.nodes,
        given.gpus_per_node,
        given.link,
        nvlink=given.nvlink,
        efficiency=given.efficiency,
    )
    found = search(shape, cluster)
    own = _own_layout(flags, cluster.gpus)
    if given.json:
        print(json.dumps(to_json(shape, cluster, found, own), indent=2))
    else:
        print(describe(shape, cluster, found, max(1, given.rows), own))
    if given.write is not None:
        best = found.fitting[0].layout
        paths = write_script(given.write, name, flags, best, cluster)
        print("written:", *paths, file=sys.stderr)


def _own_layout(flags: list[str], gpus: int) -> Layout | None:
    """Return the file's layout, or None where this cluster cannot have it."""
    try:
        return layout_in(flags, gpus)
    except ConfigError:
        return None


def _dry_run(name: str, flags: list[str]) -> None:
    from topk_megatron.plan.dry_run import dry_run, stage_table

    shape = shape_of(flags)
    start = time.perf_counter()
    stages = dry_run(flags)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{name}: {shape.parameters:,} parameters in {len(stages)} stages, all as planned")
    print(stage_table(stages))
    print(f"built on the meta device in {seconds:.0f} s; peak of this process {peak:.1f} GB")


if __name__ == "__main__":
    main()
