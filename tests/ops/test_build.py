"""The build: `auto` never breaks an install, `force` does, `off` leaves a library out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_COMPILER = {"CXX": "/nonexistent/c++", "TOPK_MEGATRON_BUILD_CUDA": "off"}


def build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the build into its own folder; return the process and the folder of the libraries."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, tmp_path / "lib" / "topk_megatron" / "ops"


def test_auto_leaves_the_reason_with_the_package(tmp_path: Path) -> None:
    done, where = build(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "/nonexistent/c++ cannot be run" in (where / "_build_error_cpu.txt").read_text()


def test_force_turns_the_reason_into_an_error(tmp_path: Path) -> None:
    done, _ = build(tmp_path, **NO_COMPILER, TOPK_MEGATRON_BUILD_CPU="force")
    assert done.returncode != 0
    assert "TOPK_MEGATRON_BUILD_CPU=force: /nonexistent/c++ cannot be run" in done.stderr


def test_off_builds_nothing(tmp_path: Path) -> None:
    done, where = build(tmp_path, **NO_COMPILER, TOPK_MEGATRON_BUILD_CPU="off")
    assert done.returncode == 0, done.stderr
    assert not where.exists()


def test_an_unknown_switch_is_named(tmp_path: Path) -> None:
    done, _ = build(tmp_path, TOPK_MEGATRON_BUILD_CPU="yes")
    assert done.returncode != 0
    assert "TOPK_MEGATRON_BUILD_CPU must be one of auto, force, off, got 'yes'" in done.stderr


def test_a_toolkit_for_another_cuda_version_is_a_reason(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    nvcc.chmod(0o755)
    done, where = build(tmp_path, TOPK_MEGATRON_BUILD_CPU="off", CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.stderr
    reason = (where / "_build_error_cuda.txt").read_text()
    assert "is for CUDA 9" in reason or "cannot be run" in reason


@pytest.mark.slow
def test_a_compiler_builds_the_cpu_library(tmp_path: Path) -> None:
    done, where = build(tmp_path, TOPK_MEGATRON_BUILD_CUDA="off")
    assert done.returncode == 0, done.stderr
    error = where / "_build_error_cpu.txt"
    if error.exists():
        pytest.skip(f"no working compiler here: {error.read_text()}")
    assert (where / "_topk_mask_cpu.so").exists()
