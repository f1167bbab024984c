"""scripts/gpu_check.sh: its plan, and steps that fail or hang, with a fake Python."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
STEPS = (
    *("machine", "library", "kernels", "oracle", "memcheck", "racecheck", "initcheck"),
    *("operator", "counters", "transport", "train_step", "pretrain", "training"),
)
# Stands for Python: the steps only show how they ended; the tables are made by the real one.
FAKE = f"""#!/bin/bash
case "$*" in
    *--help*) ;;
    *gpu.tables*) exec {sys.executable} "$@" ;;
    *gpu.machine*) echo "a card"; echo '{{"headline": "a fake card"}}' >"$4" ;;
    *gpu.oracle*) sleep 60 ;;
    *gpu.transport*) echo "the last words of a failure"; exit 3 ;;
    *) echo "fine" ;;
esac
"""


def check(*arguments: str | Path, python: str | Path = sys.executable, **more: str) -> "Done":
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(REPOSITORY), **more}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )


Done = subprocess.CompletedProcess[str]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


def plan_of(output: str) -> dict[str, int]:
    return {name: int(s) for name, s in re.findall(r"^(\w[\w ]*?) +(\d+) s", output, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_dry_run_finds_everything_that_the_steps_start() -> None:
    done = check("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    plan = plan_of(done.stdout)
    assert set(STEPS) < set(plan)


@pytest.mark.parametrize("minutes", [3, 8, 15])
@pytest.mark.parametrize("more", [(), ("--te", "/tmp")])
def test_time_limits_add_up_to_less_than_the_minutes(
    minutes: int, more: tuple[str, ...], fake: Path
) -> None:
    done = check("--dry-run", "--minutes", str(minutes), *more, python=fake)
    plan = plan_of(done.stdout)
    total = plan.pop("all together")
    assert total == sum(plan.values()) <= 60 * minutes
    assert ("transformer_engine" in plan) == bool(more)


def test_dry_run_names_a_program_that_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text('#!/bin/bash\n[[ $* != *transport* ]] || { echo "no wire" >&2; exit 1; }\n')
    broken.chmod(0o755)
    done = check("--dry-run", python=broken)
    assert done.returncode == 1
    assert "PROBLEM: benchmarks.gpu.transport does not start: no wire" in done.stdout


@pytest.mark.slow
def test_failing_and_hanging_steps_do_not_stop_the_rest(fake: Path, tmp_path: Path) -> None:
    results, copies = tmp_path / "results", tmp_path / "copies"
    only = "machine,oracle,operator,transport,pretrain,training"
    done = check("--minutes", "3", "--only", only, "--copy-to", copies, results, python=fake)
    assert done.returncode == 1
    lines = [line.split("\t") for line in (results / "steps.tsv").read_text().splitlines()]
    assert {name: status for name, status, *_ in lines} == {
        "machine": "ok",
        "oracle": "stopped at its limit",
        "operator": "ok",
        "transport": "failed (3)",
        "pretrain": "ok",
        "training": "skipped: no text: give --bundle or --corpus",
    }
    for name, _, seconds, bound in lines:
        assert int(seconds) <= int(bound) + 2, name
    assert "| transport | failed (3) |" in done.stdout
    assert "the last words of a failure" in done.stdout
    assert "| machine | ok | 0 of 13 | a fake card |" in done.stdout
    wanted = {"gpu_operator.md", "gpu_train_step.md", "gpu_checks.md", "summary.md"}
    assert {path.name for path in copies.iterdir()} == {*wanted, "results.tar.gz"}
    with tarfile.open(results / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"steps.tsv", "transport.log", *wanted} < names


def test_results_of_an_earlier_run_do_not_stay(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "operator.json").write_text('{"headline": "an old number"}')
    done = check("--minutes", "3", "--only", "operator", tmp_path, python=fake)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an old number" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "soon"], "--minutes must be 3 or more, got soon"),
        (["--minutes"], "--minutes needs a value"),
        (["--bundle", "/nowhere"], "/nowhere is not a folder"),
        (["--only", "machine,cards"], "--only has no step cards; the steps are: machine library"),
        (["--fast"], "unknown option --fast"),
        (["a", "b"], "one folder for results, got a and b"),
    ],
)
def test_wrong_command_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    done = check(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_step_changes_a_setting_of_the_card() -> None:
    texts = [SCRIPT.read_text()]
    texts += [path.read_text() for path in (REPOSITORY / "benchmarks" / "gpu").glob("*.py")]
    commands = [line for text in texts for line in text.splitlines() if "nvidia-smi" in line]
    assert commands
    for line in commands:
        assert not re.search(r"-(pm|pl|ac|lgc|lmc|rgc|mig|r|c)\b|--(lock|reset|power)", line), line
    assert "--clock-control" in (REPOSITORY / "benchmarks/gpu/counters.py").read_text()
