"""Reading the arguments of Megatron's functions that are wrapped here."""

from collections.abc import Callable
from typing import Any


def argument_reader(function: Callable[..., Any], name: str) -> Callable[[Any, Any], Any]:
    """How to find an argument of `function` in a call's (args, kwargs), however it was passed."""
    position = function.__code__.co_varnames.index(name)
    return lambda args, kwargs: kwargs[name] if name in kwargs else args[position]
