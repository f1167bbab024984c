"""Reads the subset of Dockerfile and .dockerignore syntax that this project uses."""

import fnmatch
import re
from dataclasses import dataclass, field


@dataclass
class Stage:
    """One FROM and the instructions after it.

    Attributes:
        base: An image or an earlier stage.
        steps: (keyword, value) in order, with continuation lines joined.
    """

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """Return the stages by name; fills arguments before the first FROM into FROM lines."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    stages: dict[str, Stage] = {}
    defaults: dict[str, str] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, joined.splitlines())):
        keyword, _, value = line.partition(" ")
        value = value.strip()
        if keyword == "FROM":
            base, _, name = expand(value, defaults).partition(" AS ")
            current = stages[name.strip() or str(len(stages))] = Stage(base.strip())
        elif current is not None:
            current.steps.append((keyword, value))
        elif keyword == "ARG":
            name, _, default = value.partition("=")
            defaults[name] = default
    return stages


def expand(text: str, variables: dict[str, str]) -> str:
    """Replace variables by their values, as Docker does outside RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), text)


def ignored(path: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore excludes a path of the context; the last match counts."""
    parts = path.split("/")
    out = False
    for pattern in patterns:
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
            out = not keep
    return out
