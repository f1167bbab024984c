"""Writes what pip installs into an image: the requirements of chosen extras, and their pins.

    python docker/requirements.py train hf --keep torch numpy --into /tmp/requirements

writes requirements.txt and constraints.txt. A kept package stays at the base image's version
(NVIDIA's images bring their own build of torch): the installed version replaces its pin, and the
pins of CUDA's packages and triton, which belong to torch, are left out. Needs only Python.
"""

import argparse
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
_OF_TORCH = re.compile(r"nvidia-|cuda-|triton==")


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Return the requirements of the project and these extras; resolves extras within extras.

    Raises:
        SystemExit: If there is no such extra.
    """
    known: dict[str, list[str]] = project["optional-dependencies"]
    found = list(project["dependencies"])
    todo, done = list(extras), set[str]()
    while todo:
        extra = todo.pop(0)
        if extra not in known:
            raise SystemExit(f"error: no extra {extra!r}; there are {', '.join(known)}")
        done.add(extra)
        for requirement in known[extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", requirement)
            if own:
                todo += [name for name in re.split(r",\s*", own[1]) if name not in done]
            else:
                found.append(requirement)
    return list(dict.fromkeys(found))


def constraints(lines: list[str], keep: list[str]) -> list[str]:
    """Return the pins, with kept packages at the versions that are installed here.

    Raises:
        SystemExit: If a package to keep is not installed.
    """
    pins = [line for line in lines if "==" in line and not line.startswith("#")]
    if not keep:
        return pins
    names = {name.lower() for name in keep}
    pins = [pin for pin in pins if pin.split("==")[0].lower() not in names]
    pins = [pin for pin in pins if not _OF_TORCH.match(pin.lower())]
    try:
        return [*pins, *(f"{name}=={version(name)}" for name in keep)]
    except PackageNotFoundError as error:
        raise SystemExit(f"error: --keep {error.name}: it is not installed here") from error


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--keep", nargs="+", default=[], metavar="PACKAGE")
    parser.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    pins = (PROJECT / "constraints.txt").read_text().splitlines()
    args.into.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("requirements.txt", requirements(project, args.extras)),
        ("constraints.txt", constraints(pins, args.keep)),
    ):
        (args.into / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
