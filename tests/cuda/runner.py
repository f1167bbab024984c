"""Runs cases in an emulator (`emulator/driver.cpp`) and reads back tensors and counters."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from emulated import DTYPE_CODES, MODE_CODES
from machine_code import Program
from torch import Tensor

from tests.rows import as_bits, make_rows
from topk_megatron.ops.reference import (
    WORD_BITS,
    bits_to_indices_reference,
    index_dtype,
    topk_mask_reference,
    unpack_bits,
)

SECTOR_BYTES = 32
WARP_LANES = 32
MULTIPROCESSORS = 1  # of the emulated device: blocks take turns on rows


@dataclass(frozen=True)
class Counters:
    """The emulator's counters for one launch; `opcodes` counts warp instructions by name."""

    kernel: str
    warp_instructions: int
    thread_instructions: int
    load_requests: int
    load_sectors: int
    store_requests: int
    store_sectors: int
    shared_requests: int
    shared_wavefronts: int
    atomic_requests: int
    atomic_serial: int
    barriers: int
    warnings: int
    opcodes: dict[str, int] = field(default_factory=dict)

    def per_element(self, x_RH: Tensor) -> float:
        """Return issue slots per element: a warp instruction costs 32, whatever its lanes."""
        return self.warp_instructions * WARP_LANES / x_RH.numel()


@dataclass(frozen=True)
class Forward:
    """A forward case for the driver."""

    x_RH: Tensor
    k: int
    mode: str = "value"


@dataclass(frozen=True)
class Backward:
    """A backward case for the driver."""

    dy_RH: Tensor
    bits: Tensor


@dataclass(frozen=True)
class Outcome:
    """y and bits of a forward case, or dx and no bits of a backward one."""

    out_RH: Tensor
    bits: Tensor | None
    counters: Counters


def _raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _case_line(index: int, case: Forward | Backward, folder: Path) -> str:
    forward = isinstance(case, Forward)
    tensor = case.x_RH if forward else case.dy_RH
    data = _raw(tensor) if forward else _raw(tensor) + _raw(case.bits)
    (folder / f"{index}.in").write_bytes(data)
    rows, hidden = tensor.shape
    direction, mode, k = ("forward", case.mode, case.k) if forward else ("backward", "value", 1)
    return (
        f"{direction} {DTYPE_CODES[tensor.dtype]} {MODE_CODES[mode]} {rows} {hidden} {k} "
        f"{folder / f'{index}.in'} {folder / f'{index}.out'}\n"
    )


def _outcome(index: int, case: Forward | Backward, folder: Path, line: str) -> Outcome:
    forward = isinstance(case, Forward)
    tensor = case.x_RH if forward else case.dy_RH
    data = np.fromfile(folder / f"{index}.out", dtype=np.uint8)
    split = tensor.numel() * tensor.element_size()
    out_RH = torch.from_numpy(data[:split].copy()).view(tensor.dtype).reshape(tensor.shape)
    bits = None
    if forward:
        words = -(-tensor.shape[1] // WORD_BITS)
        bits = torch.from_numpy(data[split:].copy()).view(torch.int32).reshape(-1, words)
    return Outcome(out_RH, bits, Counters(**json.loads(line)))


@dataclass(frozen=True)
class Sparse:
    """A case for the kernels of sparse rows: x [R, H], its bits, k of them in every row."""

    x_RH: Tensor
    bits: Tensor
    k: int
    index: torch.dtype


@dataclass(frozen=True)
class SparseOutcome:
    """What the kernels made of a sparse case: the last is the scatter of the second."""

    indices_RK: Tensor
    values_RK: Tensor
    dense_RH: Tensor
    counts_H: Tensor
    counters: Counters


def _sparse_outcome(path: Path, case: Sparse, line: str) -> SparseOutcome:
    rows, hidden = case.x_RH.shape
    parts = [
        (case.index, (rows, case.k)),
        (case.x_RH.dtype, (rows, case.k)),
        (case.x_RH.dtype, (rows, hidden)),
        (torch.int64, (hidden,)),
    ]
    sizes = [dtype.itemsize * int(np.prod(shape)) for dtype, shape in parts]
    raw = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).split(sizes)
    tensors = [
        piece.clone().view(dtype).reshape(shape)
        for piece, (dtype, shape) in zip(raw, parts, strict=True)
    ]
    return SparseOutcome(*tensors, counters=Counters(**json.loads(line)))


def run_sparse_cases(
    program: Program, cases: Sequence[Sparse], folder: Path
) -> list[SparseOutcome]:
    """Run all cases in one process, as `run_cases` does."""
    lines = []
    for i, case in enumerate(cases):
        (folder / f"{i}.in").write_bytes(_raw(case.x_RH) + _raw(case.bits))
        rows, hidden = case.x_RH.shape
        size = case.index.itemsize.bit_length() - 1
        files = f"{folder / f'{i}.in'} {folder / f'{i}.out'}"
        dtype = DTYPE_CODES[case.x_RH.dtype]
        lines.append(f"sparse {dtype} {size} {rows} {hidden} {case.k} {files}\n")
    reports = _run_driver(program, "".join(lines))
    return [
        _sparse_outcome(folder / f"{i}.out", case, report)
        for i, (case, report) in enumerate(zip(cases, reports, strict=True))
    ]


def run_cases(program: Program, cases: Sequence[Forward | Backward], folder: Path) -> list[Outcome]:
    """Run all cases in one process.

    Raises:
        RuntimeError: the emulator stopped or warned; the message has its output.
    """
    lines = "".join(_case_line(i, case, folder) for i, case in enumerate(cases))
    reports = _run_driver(program, lines)
    return [
        _outcome(i, case, folder, report)
        for i, (case, report) in enumerate(zip(cases, reports, strict=True))
    ]


def _run_driver(program: Program, lines: str) -> list[str]:
    command = [str(program.driver), str(MULTIPROCESSORS), *map(str, program.files)]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
    if result.stderr:
        raise RuntimeError(f"the emulator warned:\n{result.stderr}")
    return result.stdout.splitlines()


def check_sparse_rows(program: Program, folder: Path) -> list[SparseOutcome]:
    """Assert that the kernels of sparse rows equal their definitions bitwise."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for hidden in (1, 33, 250, 1024, 4099, 8192):
            x_RH = make_rows("random_bits", (5, hidden), dtype, seed=hidden)
            for k in {1, (hidden + 15) // 16, hidden}:
                key_RH = make_rows("normal", (5, hidden), torch.float32, seed=k)
                bits = topk_mask_reference(key_RH, k, "value")[1]
                cases += [
                    Sparse(x_RH, bits, k, index)
                    for index in {index_dtype(hidden), torch.int32, torch.int64}
                ]
    outcomes = run_sparse_cases(program, cases, folder)
    for case, outcome in zip(cases, outcomes, strict=True):
        hidden, raw_RH = case.x_RH.shape[1], as_bits(case.x_RH)
        mask_RH = unpack_bits(case.bits, hidden)
        indices_RK = bits_to_indices_reference(case.bits, hidden, case.k)
        about = f"{outcome.counters.kernel}, H={hidden}, k={case.k}"
        assert torch.equal(outcome.indices_RK, indices_RK.to(case.index)), about
        values_RK = raw_RH.gather(1, indices_RK.long())
        assert torch.equal(as_bits(outcome.values_RK), values_RK), about
        assert torch.equal(as_bits(outcome.dense_RH), torch.where(mask_RH, raw_RH, 0)), about
        assert torch.equal(outcome.counts_H, mask_RH.sum(0)), about
        assert outcome.counters.warnings == 0, about
    return outcomes
