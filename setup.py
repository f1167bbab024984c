"""Builds the operator's kernels; everything declarative is in pyproject.toml.

There are two shared libraries, each with its own switch in the environment:

    TOPK_MEGATRON_BUILD_CPU    auto (default) | force | off
    TOPK_MEGATRON_BUILD_CUDA   auto (default) | force | off

`auto` builds what it can. It leaves out a library that it cannot build and installs the reason with
the package, where the fallback's warning finds it. `force` turns the same problem into an error.
CUDA code is built for TORCH_CUDA_ARCH_LIST (default 8.0;9.0;10.0+PTX) by the toolkit in CUDA_HOME,
or else by the one behind `nvcc`. The C++ compiler is CXX, or else c++.

The libraries use only torch's stable ABI: one build serves torch TORCH_TARGET_VERSION and later.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("topk_megatron/ops/csrc")
CPU_SOURCES = ("bindings_cpu.cpp", "topk_mask_cpu.cpp", "topk_mask_cpu_avx2.cpp",
               "topk_mask_cpu_avx512.cpp")  # fmt: skip
CUDA_SOURCES = ("bindings_cuda.cpp", "topk_mask_cuda.cu", "topk_sparse_cuda.cu")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the first with a stable parallel_for
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"
SWITCHES = ("auto", "force", "off")


class KernelBuildError(Exception):
    """A kernel library cannot be built; the message says why."""


def switch(name: str) -> str:
    """Read TOPK_MEGATRON_BUILD_<name>."""
    variable = f"TOPK_MEGATRON_BUILD_{name.upper()}"
    value = os.environ.get(variable, "auto")
    if value not in SWITCHES:
        raise SystemExit(f"{variable} must be one of {', '.join(SWITCHES)}, got {value!r}")
    return value


def run(command: list[str]) -> str:
    """Run a compiler and return its output; if it fails, the error carries that output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise KernelBuildError(f"{command[0]} cannot be run: {problem}") from problem
    if done.returncode != 0:
        output = (done.stderr or done.stdout).strip()
        raise KernelBuildError(f"{' '.join(command)}\n{output[-4000:]}")
    return done.stdout + done.stderr


def cxx_command(*, cuda: bool) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
    flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
    flags += ["-DUSE_CUDA"] if cuda else []  # makes the stable ABI's stream functions visible
    return [*os.environ.get("CXX", "c++").split(), *flags, *(f"-I{p}" for p in include_paths())]


def find_cuda_home() -> Path:
    """Find the toolkit in CUDA_HOME, or behind the nvcc on PATH, which may be a wrapper."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    if shutil.which("nvcc") is None:
        raise KernelBuildError("no CUDA toolkit: neither CUDA_HOME nor an nvcc on PATH")
    top = re.search(r"^#\$ TOP=(.+)$", run(["nvcc", "--dryrun", "-x", "cu", os.devnull]), re.M)
    if top is None:
        raise KernelBuildError("nvcc --dryrun does not say where its toolkit is; set CUDA_HOME")
    return Path(top.group(1)).resolve()


def check_cuda_matches(nvcc: Path) -> None:
    import torch

    release = re.search(r"release (\d+)\.(\d+)", run([str(nvcc), "--version"]))
    found = release.group(1) if release else "unknown"
    wanted = (torch.version.cuda or "none").split(".")[0]
    if found != wanted:
        raise KernelBuildError(f"{nvcc} is for CUDA {found}, but this torch is for CUDA {wanted}")


def gencode_flags(arch_list: str) -> list[str]:
    """Turn `8.0;9.0+PTX` into nvcc's -gencode options."""
    flags = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildKernels(build_ext):
    """Compiles each library by plain compiler calls, which keeps the text of a failure at hand."""

    def run(self) -> None:
        target = Path(".") if self.inplace else Path(self.build_lib)
        for extension in self.extensions:
            name = extension.name.rsplit("_", 1)[-1]
            library = target / Path(*extension.name.split(".")).with_suffix(".so")
            error = library.with_name(f"_build_error_{name}.txt")
            library.parent.mkdir(parents=True, exist_ok=True)
            error.unlink(missing_ok=True)
            library.unlink(missing_ok=True)
            try:
                self.build_library(name, library)
            except (KernelBuildError, ImportError) as problem:
                if switch(name) == "force":
                    raise SystemExit(
                        f"TOPK_MEGATRON_BUILD_{name.upper()}=force: {problem}"
                    ) from None
                error.write_text(f"{problem}\n")
                print(f"warning: no {name} kernel, the reference will be used: {problem}")

    def build_library(self, name: str, library: Path) -> None:
        import torch

        sources = CUDA_SOURCES if name == "cuda" else CPU_SOURCES
        nvcc = self.find_nvcc() if name == "cuda" else None
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        compile_cxx = cxx_command(cuda=nvcc is not None)

        def compile_one(source: str) -> str:
            command = compile_cxx
            if source.endswith(".cu"):
                archs = gencode_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS))
                command = [str(nvcc), "-std=c++17", "-O3", "-Xcompiler=-fPIC", *archs]
            compiled = str(objects_dir / f"{source}.o")
            run([*command, "-c", str(CSRC / source), "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if nvcc is not None:
            libraries += [f"-L{nvcc.parent.parent / 'lib64'}", "-ltorch_cuda", "-lcudart"]
        run([*compile_cxx, "-shared", *objects, *libraries, "-o", str(library)])

    @staticmethod
    def find_nvcc() -> Path:
        nvcc = find_cuda_home() / "bin" / "nvcc"
        check_cuda_matches(nvcc)
        return nvcc

    def get_outputs(self) -> list[str]:
        return []  # setuptools requires every output to exist, and a library may be missing

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def extensions() -> list[Extension]:
    names = ["cpu"] if sys.platform != "win32" else []
    names += ["cuda"] if sys.platform == "linux" and (CSRC / CUDA_SOURCES[-1]).exists() else []
    return [
        Extension(f"topk_megatron.ops._topk_mask_{name}", sources=[])
        for name in names
        if switch(name) != "off"
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp312"}},  # the libraries do not use Python's ABI
)
