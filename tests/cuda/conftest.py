"""Builds what the CUDA tests execute, once per session."""

import os
import shutil
import subprocess

import pytest
from emulated import CSRC, HERE, EmulatedKernels, build, find_compiler
from ptx_runner import PTX_ARCHITECTURES, PtxTools


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    """Build the CUDA source under the project's own emulation."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler (g++, c++, clang++ or $CXX): the CUDA source is not executed")
    return EmulatedKernels(build(tmp_path_factory.mktemp("emulated") / "libtopk_emulated.so"))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")


@pytest.fixture(scope="session")
def nvcc() -> str:
    """Find the CUDA compiler."""
    found = os.environ.get("TOPK_NVCC") or shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on PATH: PTX and SASS are not checked")
    return found


@pytest.fixture(scope="session")
def ptx_tools(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> PtxTools:
    """Build the PTX, and the driver with the PTX emulator."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler: PTX is not executed")
    folder = tmp_path_factory.mktemp("ptx")
    driver, emulator = folder / "driver", HERE / "emulator"
    # fmt: off
    _run([compiler, "-O2", "-std=c++17", "-w", f"-I{emulator}/ptx", f"-I{CSRC}",
          str(emulator / "driver.cpp"), str(emulator / "ptx" / "ptxemu.cc"), "-o", str(driver)])
    # fmt: on
    ptx = {arch: folder / f"topk_mask_{arch}.ptx" for arch in PTX_ARCHITECTURES}
    for arch, path in ptx.items():
        kernel = str(CSRC / "topk_mask_cuda.cu")
        _run([nvcc, "-O3", "-std=c++17", f"-arch=compute_{arch}", "-ptx", kernel, "-o", str(path)])
    return PtxTools(driver, ptx)
