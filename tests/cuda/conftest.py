"""Builds what the CUDA tests execute, once per session."""

import os
from pathlib import Path

import pytest
from emulated import EmulatedKernels, build, find_compiler
from machine_code import Language, Toolchain, find_cuda_tool, find_nvcc
from snippets import Compile, SnippetRunner, module


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    """Build the CUDA source under the project's own emulation."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler (g++, c++, clang++ or $CXX): the CUDA source is not executed")
    return EmulatedKernels(build(tmp_path_factory.mktemp("emulated") / "libtopk_emulated.so"))


@pytest.fixture(scope="session")
def toolchain(tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    """Provide what nvcc makes of the kernels; the processes of a parallel session share it."""
    nvcc, compiler = find_nvcc(), find_compiler()
    if nvcc is None:
        pytest.skip("no nvcc (PATH or TOPK_NVCC): PTX and SASS are not checked")
    if compiler is None:
        pytest.skip("no C++ compiler: PTX and SASS are not executed")
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Toolchain(nvcc, compiler, session / "toolchain")


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    """Find the disassembler."""
    found = find_cuda_tool("cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump (PATH or TOPK_CUOBJDUMP): SASS is not checked")
    return found


@pytest.fixture(scope="module", params=["ptx", "sass"])
def language(request: pytest.FixtureRequest) -> Language:
    return request.param


@pytest.fixture
def compiled(
    language: Language, toolchain: Toolchain, tmp_path: Path, request: pytest.FixtureRequest
) -> Compile:
    """Return a function that prepares snippets for execution."""
    cuobjdump = request.getfixturevalue("cuobjdump") if language == "sass" else None

    def prepare(bodies: dict[str, str], declarations: str = "") -> SnippetRunner:
        ptx = tmp_path / "snippet.ptx"
        ptx.write_text(module(bodies, declarations))
        return toolchain.snippets(language, ptx, cuobjdump)

    return prepare
