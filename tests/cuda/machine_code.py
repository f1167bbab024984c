"""What nvcc and ptxas make of the kernels, and the programs that execute it on a CPU.

`Toolchain` keeps everything in one folder and makes each file once, also when several processes
of a parallel test session ask for it.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emulated import CSRC, HERE
from snippets import SnippetRunner

EMULATOR = HERE / "emulator"
Language = Literal["ptx", "sass"]
SASS_ARCH = "90"  # whose machine code the emulator executes
HOST_ARCH = "90"  # of the launcher's host code, which is the same for all


@dataclass(frozen=True)
class Program:
    """A driver that executes one machine language, and the program files to execute."""

    driver: Path
    files: tuple[Path, ...]


def find_nvcc() -> str | None:
    """Find TOPK_NVCC, or the CUDA compiler on PATH."""
    return os.environ.get("TOPK_NVCC") or shutil.which("nvcc")


def find_cuda_tool(name: str) -> str | None:
    """Find a tool such as cuobjdump: on PATH, or the one that torch's dependency triton ships."""
    found = os.environ.get(f"TOPK_{name.upper()}") or shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(shipped) if shipped.exists() else None
    return found


def _run(command: list[str | Path]) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Toolchain:
    """Compiles the kernels in `csrc` with `nvcc` into `folder`."""

    def __init__(self, nvcc: str, compiler: str, folder: Path, csrc: Path = CSRC) -> None:
        self._nvcc, self._compiler, self._folder, self._csrc = nvcc, compiler, folder, csrc
        folder.mkdir(parents=True, exist_ok=True)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder `name`, which `make` fills if nobody has done so."""
        place, done = self._folder / name, self._folder / f"{name}.done"
        with _locked(self._folder / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                make(place)
                done.touch()
        return place

    def _sources(self) -> list[Path]:
        return sorted(self._csrc.glob("*.cu"))

    def _compile_ptx(self, arch: str, place: Path) -> None:
        """Write each source's PTX, and its host code for the driver."""
        virtual = f"arch=compute_{arch},code=compute_{arch}"
        for source in self._sources():
            output = place / f"{source.stem}.o"
            # fmt: off
            _run([self._nvcc, "-O3", "-std=c++17", "-gencode", virtual, "--keep", "--keep-dir",
                  place, "-c", source, "-o", output])
            # fmt: on

    def ptx(self, arch: str) -> tuple[Path, ...]:
        """Return the PTX files of an architecture such as "90"."""
        place = self._once(f"ptx_{arch}", lambda place: self._compile_ptx(arch, place))
        return tuple(place / f"{source.stem}.ptx" for source in self._sources())

    def _compile_cubins(self, arch: str, place: Path) -> None:
        for ptx in self.ptx(arch):
            # fmt: off
            report = _run([self._nvcc, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", ptx,
                           "-o", place / f"{ptx.stem}.cubin"])
            # fmt: on
            (place / f"{ptx.stem}.report").write_text(report)

    def cubins(self, arch: str) -> tuple[tuple[Path, str], ...]:
        """Return each cubin of an architecture with ptxas's report about it."""
        place = self._once(f"cubin_{arch}", lambda place: self._compile_cubins(arch, place))
        cubins = [place / f"{source.stem}.cubin" for source in self._sources()]
        return tuple((cubin, cubin.with_suffix(".report").read_text()) for cubin in cubins)

    def _compile_emulator(self, language: Language, place: Path) -> None:
        sources = [*EMULATOR.glob("*.cc"), *(EMULATOR / language).glob("*.cc")]
        for source in sources:
            # fmt: off
            _run([self._compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", f"-I{EMULATOR}",
                  "-c", source, "-o", place / f"{source.stem}.o"])
            # fmt: on

    def _link(self, language: Language, main: str, objects: list[Path], place: Path) -> None:
        emulator = self._once(
            f"emulator_{language}", lambda place: self._compile_emulator(language, place)
        )
        # fmt: off
        _run([self._compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", f"-I{EMULATOR}",
              f"-I{self._csrc}", EMULATOR / "programs" / f"{main}.cpp", *objects,
              *sorted(emulator.glob("*.o")), "-o", place / "driver"])
        # fmt: on

    def operator_driver(self, language: Language) -> Path:
        """Build what runs the operator's entry points. Their host code is that of HOST_ARCH."""
        objects = [path.with_suffix(".o") for path in self.ptx(HOST_ARCH)]
        return (
            self._once(
                f"operator_{language}",
                lambda place: self._link(language, "operator", objects, place),
            )
            / "driver"
        )

    def snippet_driver(self, language: Language) -> Path:
        """Build what runs a single kernel of a test."""
        return (
            self._once(
                f"snippet_{language}", lambda place: self._link(language, "snippet", [], place)
            )
            / "driver"
        )

    def snippets(
        self, language: Language, ptx: Path, cuobjdump: str | None = None
    ) -> SnippetRunner:
        """Prepare the kernels of a test's own PTX file."""
        if language == "ptx":
            return SnippetRunner(self.snippet_driver(language), ptx)
        assert cuobjdump is not None
        cubin, program = ptx.with_suffix(".cubin"), ptx.with_suffix(".sass")
        _run([self._nvcc, f"-arch=sm_{SASS_ARCH}", "-cubin", ptx, "-o", cubin])
        program.write_text(sass_program(cuobjdump, cubin))
        return SnippetRunner(self.snippet_driver(language), program)

    def ptx_program(self, arch: str) -> Program:
        """Return what executes an architecture's PTX."""
        return Program(self.operator_driver("ptx"), self.ptx(arch))

    def _disassemble_all(self, cuobjdump: str, place: Path) -> None:
        for cubin, _ in self.cubins(SASS_ARCH):
            (place / f"{cubin.stem}.sass").write_text(sass_program(cuobjdump, cubin))

    def sass_program(self, cuobjdump: str) -> Program:
        """Return what executes SASS_ARCH's machine code."""
        place = self._once("sass", lambda place: self._disassemble_all(cuobjdump, place))
        return Program(self.operator_driver("sass"), tuple(sorted(place.glob("*.sass"))))


def disassemble(cuobjdump: str, cubin: Path) -> dict[str, str]:
    """Return the text of each kernel's machine code."""
    sass = _run([cuobjdump, "-sass", cubin])
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))


def _parameters(cuobjdump: str, cubin: Path) -> dict[str, list[tuple[int, int]]]:
    """Return where each kernel's parameters are in constant bank 0, with their sizes, in order."""
    elf = _run([cuobjdump, "-elf", cubin])
    found = {}
    for name, section in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.|\Z)", elf, re.DOTALL | re.M):
        base = re.search(r"EIATTR_PARAM_CBANK\s.*?Value:\s+\S+ (0x[0-9a-f]+)", section, re.DOTALL)
        if base is None:
            raise ValueError(f"cuobjdump says nothing about the parameters of {name}")
        start = int(base[1], 16) & 0xFFFF
        items = re.findall(r"Ordinal : (\S+)\s+Offset  : (\S+)\s+Size    : (\S+)", section)
        numbers = sorted(tuple(int(text, 16) for text in item) for item in items)
        found[name] = [(start + offset, size) for _, offset, size in numbers]
    return found


def sass_program(cuobjdump: str, cubin: Path) -> str:
    """Return a cubin as a program file for the SASS emulator; its parser describes the form."""
    usage = _run([cuobjdump, "--dump-resource-usage", cubin])
    sizes = dict(re.findall(r"Function (\w+):\s*\n(.*)", usage))
    parameters = _parameters(cuobjdump, cubin)
    lines = []
    for name, body in disassemble(cuobjdump, cubin).items():
        size = {what: re.search(rf"{what}:(\d+)", sizes[name]) for what in ("SHARED", "LOCAL")}
        numbers = " ".join(found[1] if found else "0" for found in size.values())
        places = " ".join(f"{offset}:{bytes_}" for offset, bytes_ in parameters[name])
        lines.append(f"KERNEL {name} {numbers} {places}")
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body):
            lines.append(f"{address} {text}")
    return "\n".join(lines) + "\n"
