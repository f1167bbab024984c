"""Reads a Dockerfile and a .dockerignore: as much of both as this project's own use."""

import fnmatch
import re
from dataclasses import dataclass, field


@dataclass
class Stage:
    """One FROM and what follows it.

    Attributes:
        base: image or earlier stage.
        steps: (keyword, value) in order, continuation lines joined.
    """

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """Stages by name. Arguments before the first FROM are put in where FROM names them."""
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
    """Put variables in, as Docker does outside of RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), text)


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a path (relative to the context) out; the last match counts."""
    parts = path.split("/")
    out = False
    for pattern in patterns:
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = parts if anywhere else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
            out = not keep
    return out
