"""scripts/test.sh runs the suite on the CPU and tests/gpu on the GPU; both commands are fakes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import wants_gpus
from tests.harness.launch import REPOSITORY

CPU = "-m pytest --numprocesses 2 --dist loadfile"
ONE_GPU = 'echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"'
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it could not communicate with the driver"; exit 9'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the script, and a Python that records its arguments."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "test.sh", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    command(
        tmp_path / ".venv" / "bin" / "python",
        'echo "$*" >> "$RECORD"; case "$*" in *numprocesses*) exit "${CPU_CODE:-0}";; '
        '*) exit "${GPU_CODE:-0}";; esac',
    )
    return tmp_path


def command(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run(project: Path, *arguments: str, **variables: str) -> tuple[list[str], int]:
    """Run the script; return the commands that it ran and its exit code."""
    record = project / "record"
    record.unlink(missing_ok=True)
    path = f"{project / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        [project / "scripts" / "test.sh", *arguments],
        env={"PATH": path, "RECORD": str(record), **variables},
        timeout=60,
    )
    return record.read_text().splitlines(), done.returncode


@pytest.mark.parametrize("driver", [None, NO_DRIVER])
def test_without_a_gpu_one_command_runs_everything(project: Path, driver: str | None) -> None:
    if driver is not None:
        command(project / "bin" / "nvidia-smi", driver)
    elif shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has nvidia-smi")
    assert run(project) == ([CPU], 0)
    assert run(project, "-m", "not slow", "tests/ops") == ([f"{CPU} -m not slow tests/ops"], 0)
    assert run(project, CPU_CODE="1") == ([CPU], 1)


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        ([], [f"{CPU} --ignore tests/gpu", "-m pytest tests/gpu"]),
        (["-x"], [f"{CPU} --ignore tests/gpu -x", "-m pytest -x tests/gpu"]),
        (["tests"], [f"{CPU} --ignore tests/gpu", "-m pytest tests/gpu"]),
        (["tests/ops", "-x"], [f"{CPU} --ignore tests/gpu -x tests/ops"]),
        (["tests/gpu", "-x"], ["-m pytest -x tests/gpu"]),
        (
            ["tests/gpu/test_kernel.py", "tests/hf"],
            [f"{CPU} --ignore tests/gpu tests/hf", "-m pytest tests/gpu/test_kernel.py"],
        ),
    ],
)
def test_with_a_gpu_two_commands_share_the_suite(
    project: Path, arguments: list[str], commands: list[str]
) -> None:
    command(project / "bin" / "nvidia-smi", ONE_GPU)
    assert run(project, *arguments) == (commands, 0)


def test_a_failure_in_either_run_fails_the_whole(project: Path) -> None:
    command(project / "bin" / "nvidia-smi", ONE_GPU)
    for codes, expected in (
        ({"CPU_CODE": "1"}, 1),
        ({"GPU_CODE": "1"}, 1),
        ({"CPU_CODE": "1", "GPU_CODE": "5"}, 1),
        ({"GPU_CODE": "5"}, 0),  # the options select no test of tests/gpu
    ):
        commands, code = run(project, **codes)
        assert (len(commands), code) == (2, expected)
    assert run(project, "tests/gpu", GPU_CODE="5")[1] == 5


def test_make_runs_the_script() -> None:
    """The dry run of make shows what `make test` and `make test-fast` would run."""
    for target, words in (("test", "scripts/test.sh -x"), ("test-fast", '-m "not slow" -x')):
        done = subprocess.run(
            ["make", "--dry-run", target, "ARGS=-x", "WORKERS=3"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "WORKERS=3 scripts/test.sh" in done.stdout
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["tests"], False),
        (["tests/ops"], False),
        (["tests/gpu"], True),
        (["tests/gpu/test_kernel.py::test_the_same_on_every_run"], True),
        (["tests/gpu", "tests/ops"], False),
    ],
)
def test_only_a_run_of_the_gpu_tests_alone_sees_gpus(
    arguments: list[str], expected: bool, tmp_path: Path
) -> None:
    assert wants_gpus(arguments, REPOSITORY) is expected


@pytest.mark.parametrize(("path", "seen"), [("tests/gpu", "0"), ("tests/test_config.py", "")])
def test_gpus_are_hidden_before_tests_are_collected(path: str, seen: str, tmp_path: Path) -> None:
    """A plug-in that runs after tests/conftest.py prints what collection will see."""
    (tmp_path / "look.py").write_text(
        "import os\n"
        "def pytest_collection(session):\n"
        "    print('SEEN', repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
    )
    search = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "look", "--collect-only", "-q", path],
        env={**os.environ, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": "0"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"SEEN {seen!r}" in done.stdout, done.stdout + done.stderr
