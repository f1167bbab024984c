"""scripts/setup.sh on machines with odd Pythons, with fake commands first on PATH."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY

CONSTRAINTS = ("constraints.txt", "constraints-transformers-4.txt")
pytestmark = pytest.mark.skipif(
    any(Path(folder, "python3.12").exists() for folder in ("/usr/bin", "/bin")),
    reason="the system itself has Python 3.12, so a machine without it cannot be simulated",
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of the files that setup.sh reads, and an empty folder that comes first on PATH."""
    (tmp_path / "bin").mkdir()
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "setup.sh", project / "scripts")
    for name in (*CONSTRAINTS, "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, project)
    return tmp_path


def command(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def setup(machine: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": f"{machine / 'bin'}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
    script = machine / "project" / "scripts" / "setup.sh"
    return subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60
    )


def test_without_any_python_it_says_what_is_missing(machine: Path) -> None:
    done = setup(machine)
    assert done.returncode == 1
    assert "Python 3.12 or newer is needed" in done.stderr
    assert "uv" in done.stderr


def test_uv_is_preferred_to_a_failing_shim_and_an_old_python(machine: Path) -> None:
    command(machine, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    command(machine, "python3.13", "exit 1")
    command(machine, "uv", f'echo "$@" > {machine}/uv-was-asked; exit 7')
    done = setup(machine)
    assert done.returncode == 7
    assert "asking uv" in done.stdout
    assert (machine / "uv-was-asked").read_text() == "venv --quiet --python 3.12 --seed .venv\n"


def test_a_python_that_only_pyenv_knows_is_found(machine: Path) -> None:
    prefix = machine / "versions" / "3.12.9"
    (prefix / "bin").mkdir(parents=True)
    made = f'case "$*" in *venv*.venv) echo "$0" > {machine}/made-by; exit 9;; esac'
    (prefix / "bin" / "python3").write_text(f"#!/bin/bash\n{made}\nexit 0\n")
    (prefix / "bin" / "python3").chmod(0o755)
    command(machine, "python3.12", "exit 127")
    command(
        machine,
        "pyenv",
        f'case "$1" in versions) echo 3.12.9;; prefix) echo {machine}/versions/$2;; esac',
    )
    done = setup(machine)
    assert done.returncode == 9
    assert (machine / "made-by").read_text() == f"{prefix}/bin/python3\n"
