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

from topk_megatron.ops.reference import WORD_BITS

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


def run_cases(program: Program, cases: Sequence[Forward | Backward], folder: Path) -> list[Outcome]:
    """Run all cases in one process.

    Raises:
        RuntimeError: the emulator stopped or warned; the message has its output.
    """
    lines = "".join(_case_line(i, case, folder) for i, case in enumerate(cases))
    command = [str(program.driver), str(MULTIPROCESSORS), *map(str, program.files)]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
    reports = result.stdout.splitlines()
    if result.stderr:
        raise RuntimeError(f"the emulator warned:\n{result.stderr}")
    return [
        _outcome(i, case, folder, report)
        for i, (case, report) in enumerate(zip(cases, reports, strict=True))
    ]
