"""The subcommands of tools/analyze.py; each module registers its own flags and what they do.

A module has ``register(commands)``, which adds its parser and sets ``run`` on it: a function of the
parsed arguments. To add a subcommand, write such a module and name it in `MODULES`.
"""

import argparse
import importlib
from typing import Any

MODULES = ("record", "entropy", "track", "steer", "sae", "report")


def register_all(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add every subcommand."""
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}").register(commands)


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def share(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number
