"""Builds the CUDA kernels with a C++ compiler and runs them on CPU, one fiber per CUDA thread."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from topk_megatron.ops.reference import WORD_BITS

HERE = Path(__file__).parent
# The mutant study points this to its own copy.
CSRC = Path(os.environ.get("TOPK_CSRC", HERE.parents[1] / "topk_megatron" / "ops" / "csrc"))
OPTIMISATION = os.environ.get("TOPK_EMULATION_OPTIMISATION", "-O1")
LIBRARY_SOURCE = HERE / "emulation" / "topk_mask_emulated.cpp"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODE_CODES = {"value": 0, "abs": 1}
VARIANTS = ("warp2", "warp4", "warp8", "warp16", "block8", "stream")


def find_compiler() -> str | None:
    """Find a C++17 compiler: $CXX, or one of the usual names."""
    return next(
        (
            found
            for name in (os.environ.get("CXX"), "g++", "c++", "clang++")
            if name and (found := shutil.which(name))
        ),
        None,
    )


def build(
    output: Path, *, csrc: Path = CSRC, flags: tuple[str, ...] = (), source: Path = LIBRARY_SOURCE
) -> Path:
    """Compile the emulated kernels to `output`, a library or, from another source, a program.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        RuntimeError: the compiler failed; the message has its output.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or set CXX")
    kind = ("-shared", "-fPIC") if source == LIBRARY_SOURCE else ()
    # fmt: off
    command = [compiler, "-std=c++17", OPTIMISATION, "-Wall", "-Wextra", "-Wno-unknown-pragmas",
               *flags, *kind, f"-I{LIBRARY_SOURCE.parent}", f"-I{csrc}", str(source),
               "-o", str(output)]
    # fmt: on
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return output


class EmulatedKernels:
    """The launcher's functions on CPU tensors [R, H]."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_forward.argtypes = [
            *[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int] * 4,
            ctypes.c_int64, ctypes.c_uint64,
        ]  # fmt: skip
        self._library.emulated_backward.argtypes = [
            *[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int] * 2, ctypes.c_uint64,
        ]  # fmt: skip
        self._library.emulated_bits_to_indices.argtypes = [
            *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_int] * 3, ctypes.c_uint64,
        ]  # fmt: skip
        for name in ("emulated_gather_row", "emulated_scatter_row"):
            getattr(self._library, name).argtypes = [
                *[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int] * 4, ctypes.c_uint64,
            ]  # fmt: skip
        self._library.emulated_count_bits.argtypes = [
            *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_int, ctypes.c_uint64,
        ]  # fmt: skip

    def forward(
        self, x_RH: Tensor, k: int, mode: str, *, seed: int = 0, resident: int = 1
    ) -> tuple[Tensor, Tensor, str]:
        """Return y [R, H], bits [R, ceil(H / 32)] and the name of the variant that ran.

        At most `resident` blocks run, so that they take turns on more rows than they have.
        """
        rows, hidden = x_RH.shape
        y_RH = torch.full_like(x_RH, 7.0)
        bits = torch.full((rows, -(-hidden // WORD_BITS)), 0x55555555, dtype=torch.int32)
        variant = self._library.emulated_forward(
            x_RH.data_ptr(), y_RH.data_ptr(), bits.data_ptr(), rows, hidden, k,
            DTYPE_CODES[x_RH.dtype], MODE_CODES[mode], resident, seed,
        )  # fmt: skip
        return y_RH, bits, VARIANTS[variant]

    def backward(self, dy_RH: Tensor, bits: Tensor, *, seed: int = 0) -> Tensor:
        """Return dx [R, H]: dy on the selected coordinates, +0 elsewhere."""
        rows, hidden = dy_RH.shape
        dx_RH = torch.full_like(dy_RH, 7.0)
        self._library.emulated_backward(
            dy_RH.data_ptr(), bits.data_ptr(), dx_RH.data_ptr(), rows, hidden,
            DTYPE_CODES[dy_RH.dtype], seed,
        )  # fmt: skip
        return dx_RH

    def bits_to_indices(
        self, bits: Tensor, hidden: int, k: int, dtype: torch.dtype, *, seed: int = 0
    ) -> Tensor:
        """Return the positions of the set bits of bits [R, W] as [R, k]."""
        indices = torch.full((bits.shape[0], k), 7, dtype=dtype)
        self._library.emulated_bits_to_indices(
            bits.data_ptr(), indices.data_ptr(), bits.shape[0], hidden, k, dtype.itemsize, seed
        )
        return indices

    def gather_row(self, x_RH: Tensor, indices_RK: Tensor, *, seed: int = 0) -> Tensor:
        """Return x at the indices, [R, K]."""
        rows, hidden = x_RH.shape
        values_RK = torch.full(indices_RK.shape, 7.0, dtype=x_RH.dtype)
        self._library.emulated_gather_row(
            x_RH.data_ptr(), indices_RK.data_ptr(), values_RK.data_ptr(), rows, hidden,
            indices_RK.shape[1], x_RH.itemsize, indices_RK.itemsize, seed,
        )  # fmt: skip
        return values_RK

    def scatter_row(
        self, values_RK: Tensor, indices_RK: Tensor, hidden: int, *, seed: int = 0
    ) -> Tensor:
        """Return [R, hidden] with the values at the indices and +0 elsewhere."""
        rows, k = values_RK.shape
        x_RH = torch.full((rows, hidden), 7.0, dtype=values_RK.dtype)
        self._library.emulated_scatter_row(
            values_RK.data_ptr(), indices_RK.data_ptr(), x_RH.data_ptr(), rows, hidden, k,
            values_RK.itemsize, indices_RK.itemsize, seed,
        )  # fmt: skip
        return x_RH

    def count_bits(self, bits: Tensor, hidden: int, *, seed: int = 0) -> Tensor:
        """Return how many rows have each bit set, int64 [hidden]."""
        counts = torch.zeros(hidden, dtype=torch.int64)
        self._library.emulated_count_bits(
            bits.data_ptr(), counts.data_ptr(), bits.shape[0], hidden, seed
        )
        return counts
