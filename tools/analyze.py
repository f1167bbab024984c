"""Study the neurons of exported models: what they mean, when they form, and what they do.

python tools/analyze.py record --model hf/topk --corpus data/text --study study --name topk
python tools/analyze.py entropy --study study --runs topk
torchrun --nproc-per-node 8 tools/analyze.py record …    shares the work between ranks

Formats and formulas: docs/analysis.md.
"""

import argparse
import importlib

from topk_megatron.cli import exit_on_user_error

# Each module has ``register(commands)``, which adds a parser whose default ``run`` is a function of
# the parsed arguments.
COMMANDS = (
    "topk_megatron.analysis.record.command",
    "topk_megatron.analysis.entropy.command",
    "topk_megatron.analysis.track.command",
    "topk_megatron.analysis.steer.command",
    "topk_megatron.analysis.sae.command",
    "topk_megatron.web.report.command",
)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        importlib.import_module(module).register(commands)
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Run one subcommand."""
    args = parse()
    args.run(args)


if __name__ == "__main__":
    main()
