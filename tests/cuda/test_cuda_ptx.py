"""nvcc's output for the kernels, without a GPU: the PTX's results and counters, and the SASS.

Counters are the terms of the roofline, not a time. An H100 issues 132 x 4 x 1.755e9 warp
instructions and moves 3.35e12 bytes per second. It issues 71 thread instructions in the time to
move 8 bytes (a float32 read and written), and 35 in the time to move 4. Below that, and with every
sector moved once, memory limits the kernel.
"""

import re
from pathlib import Path

import pytest
import torch
from emulated import DTYPES
from machine_code import Toolchain, disassemble
from runner import (
    SECTOR_BYTES,
    Backward,
    Counters,
    Forward,
    Outcome,
    run_cases,
)

from tests.rows import KINDS, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

PTX_ARCHITECTURES = ("80", "90")
SASS_ARCHITECTURES = ("80", "90", "100")
INSTRUCTIONS_PER_ELEMENT = {"bfloat16": 35, "float32": 71}
COUNTED_K = 128
COUNTED_HIDDEN = (2048, 4096, 8192)
TIED_KINDS = ("relu", "few_distinct", "zeros_of_both_signs", "all_equal")
COUNTED_ROWS = 8

arch_parameter = pytest.mark.parametrize("arch", PTX_ARCHITECTURES)


def check_forward(cases: list[Forward], outcomes: list[Outcome]) -> None:
    for case, outcome in zip(cases, outcomes, strict=True):
        y_RH, bits = topk_mask_reference(case.x_RH, case.k, case.mode)
        about = f"{outcome.counters.kernel}, k={case.k}, {tuple(case.x_RH.shape)}"
        assert torch.equal(as_bits(outcome.out_RH), as_bits(y_RH)), f"y differs: {about}"
        assert outcome.bits is not None
        assert torch.equal(outcome.bits, bits), f"bits differ: {about}"
        assert outcome.counters.warnings == 0, about


@arch_parameter
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_equals_the_reference(
    toolchain: Toolchain, arch: str, dtype: str, tmp_path: Path
) -> None:
    cases = []
    for hidden in (1, 33, 40, 256, 777, 1024, 2048, 2049, 2304, 4096):
        for kind in KINDS:
            x_RH = make_rows(kind, (2 if hidden < 2048 else 1, hidden), DTYPES[dtype], seed=hidden)
            modes = ("value", "abs") if kind in ("normal", "nans") else ("value",)
            for k in sorted({1, (hidden + 15) // 16, (hidden + 1) // 2, hidden}):
                cases += [Forward(x_RH, k, mode) for mode in modes]
    check_forward(cases, run_cases(toolchain.ptx_program(arch), cases, tmp_path))


@arch_parameter
def test_ptx_of_backward_equals_the_reference(
    toolchain: Toolchain, arch: str, tmp_path: Path
) -> None:
    cases = []
    for dtype in DTYPES.values():
        for hidden in (1, 33, 1024, 2049, 4096):
            x_RH = make_rows("few_distinct", (5, hidden), dtype, seed=hidden)
            bits = topk_mask_reference(x_RH, (hidden + 2) // 3, "value")[1]
            cases.append(Backward(make_rows("random_bits", (5, hidden), dtype, seed=1), bits))
    outcomes = run_cases(toolchain.ptx_program(arch), cases, tmp_path)
    for case, outcome in zip(cases, outcomes, strict=True):
        kept_RH = unpack_bits(case.bits, case.dy_RH.shape[1])
        expected_RH = torch.where(kept_RH, as_bits(case.dy_RH), 0)
        assert torch.equal(as_bits(outcome.out_RH), expected_RH), outcome.counters.kernel
        assert outcome.counters.warnings == 0


@pytest.fixture(scope="module")
def counted(
    toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, str], tuple[Forward, Counters]]:
    """Count by (dtype, H, kind) at k = 128, and check the results."""
    keys, cases = [], []
    for dtype in INSTRUCTIONS_PER_ELEMENT:
        for hidden in COUNTED_HIDDEN:
            for kind in ("normal", *TIED_KINDS):
                x_RH = make_rows(kind, (COUNTED_ROWS, hidden), DTYPES[dtype], seed=7)
                keys.append((dtype, hidden, kind))
                cases.append(Forward(x_RH, COUNTED_K))
    folder = tmp_path_factory.mktemp("counted")
    outcomes = run_cases(toolchain.ptx_program("90"), cases, folder)
    check_forward(cases, outcomes)
    return {
        key: (case, outcome.counters)
        for key, case, outcome in zip(keys, cases, outcomes, strict=True)
    }


counted_parameter = pytest.mark.parametrize(
    ("dtype", "hidden"), [(d, h) for d in INSTRUCTIONS_PER_ELEMENT for h in COUNTED_HIDDEN]
)


@counted_parameter
def test_every_sector_is_read_once_and_written_once(counted: dict, dtype: str, hidden: int) -> None:
    for kind in ("normal", *TIED_KINDS):
        case, counters = counted[dtype, hidden, kind]
        row_sectors = case.x_RH.numel() * case.x_RH.element_size() // SECTOR_BYTES
        bits_sectors = case.x_RH.numel() // 8 // SECTOR_BYTES
        assert counters.load_sectors == row_sectors, kind
        assert counters.store_sectors == row_sectors + bits_sectors, kind


@counted_parameter
def test_instructions_stay_below_what_memory_leaves_time_for(
    counted: dict, dtype: str, hidden: int
) -> None:
    for kind in ("normal", *TIED_KINDS):
        case, counters = counted[dtype, hidden, kind]
        assert counters.per_element(case.x_RH) <= INSTRUCTIONS_PER_ELEMENT[dtype], kind


@counted_parameter
def test_ties_cost_no_more_than_half_again(counted: dict, dtype: str, hidden: int) -> None:
    normal = counted[dtype, hidden, "normal"][1]
    for kind in TIED_KINDS:
        tied = counted[dtype, hidden, kind][1]
        assert tied.warp_instructions <= 1.5 * normal.warp_instructions, kind


@counted_parameter
def test_ties_serialise_neither_banks_nor_atomics(counted: dict, dtype: str, hidden: int) -> None:
    normal = counted[dtype, hidden, "normal"][1]
    for kind in ("normal", *TIED_KINDS):
        _, counters = counted[dtype, hidden, kind]
        assert counters.atomic_serial == counters.atomic_requests, kind
        assert counters.atomic_requests <= 2 * normal.atomic_requests, kind
        assert counters.shared_wavefronts <= 1.3 * counters.shared_requests, kind


@pytest.fixture(scope="module", params=SASS_ARCHITECTURES)
def cubins(request: pytest.FixtureRequest, toolchain: Toolchain) -> tuple[tuple[Path, str], ...]:
    """Compile one architecture's machine code; also return ptxas's reports about it."""
    return toolchain.cubins(request.param)


def test_no_kernel_spills_registers(cubins: tuple[tuple[Path, str], ...]) -> None:
    reports = "".join(report for _, report in cubins)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", reports)
    assert len(spills) == 3 * 2 * 5 + 2, "a kernel is missing from ptxas's report"
    assert set(spills) == {("0", "0")}


def test_rows_move_by_128_bit_accesses(
    cubins: tuple[tuple[Path, str], ...], cuobjdump: str
) -> None:
    bodies = {}
    for cubin, _ in cubins:
        bodies |= disassemble(cuobjdump, cubin)
    for kernel, body in bodies.items():
        loads, stores = re.findall(r"LDG\.\S+", body), re.findall(r"STG\.\S+", body)
        assert any(".128" in load for load in loads), kernel
        assert any(".128" in store for store in stores), kernel
        if kernel.endswith(("warp2", "warp4", "warp8", "block8")):
            assert all(".128" in load for load in loads), kernel
            assert all(".128" in store or ".U8" in store for store in stores), kernel
