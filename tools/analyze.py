"""Study the neurons of exported models: what they mean, when they came to be, what they do.

python tools/analyze.py record --model hf/topk --corpus data/text --study study --name topk
python tools/analyze.py entropy --study study --runs topk
torchrun --nproc-per-node 8 tools/analyze.py record …    shares the work between ranks

Formats and formulas: docs/analysis.md.
"""

import argparse

from topk_megatron.analysis.commands import register_all
from topk_megatron.cli import exit_on_user_error


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    register_all(commands)
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Run one subcommand."""
    args = parse()
    args.run(args)


if __name__ == "__main__":
    main()
