"""nvcc's PTX for the kernels, executed on CPU, and what ptxas says of it: registers, accesses."""

import re
from pathlib import Path

import pytest
import torch
from emulated import DTYPES
from machine_code import Toolchain, disassemble
from runner import Backward, Forward, Outcome, check_sparse_rows, run_cases

from tests.rows import KINDS, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

PTX_ARCHITECTURES = ("80", "90")
SASS_ARCHITECTURES = ("80", "90", "100")
FORWARD_KERNELS = 3 * 2 * 6  # dtypes, modes, variants
BACKWARD_KERNELS = 2 * 2  # widths, layouts
SPARSE_KERNELS = 4 + 2 * 4 * 3 + 1  # indices; values of three widths there and back; counts

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
            x_RH = make_rows(kind, (5 if hidden < 1000 else 2, hidden), DTYPES[dtype], seed=hidden)
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


@arch_parameter
def test_ptx_of_sparse_rows_equals_the_reference(
    toolchain: Toolchain, arch: str, tmp_path: Path
) -> None:
    check_sparse_rows(toolchain.ptx_program(arch), tmp_path)


@pytest.fixture(scope="module", params=SASS_ARCHITECTURES)
def cubins(request: pytest.FixtureRequest, toolchain: Toolchain) -> tuple[tuple[Path, str], ...]:
    """Compile one architecture's machine code; also return ptxas's reports about it."""
    return toolchain.cubins(request.param)


def test_no_kernel_spills_registers(cubins: tuple[tuple[Path, str], ...]) -> None:
    reports = "".join(report for _, report in cubins)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", reports)
    kernels = FORWARD_KERNELS + BACKWARD_KERNELS + SPARSE_KERNELS
    assert len(spills) == kernels, "a kernel is missing from ptxas's report"
    assert set(spills) == {("0", "0")}


def test_rows_move_by_128_bit_accesses(
    cubins: tuple[tuple[Path, str], ...], cuobjdump: str
) -> None:
    bodies = {}
    for cubin, _ in cubins:
        bodies |= disassemble(cuobjdump, cubin)
    for kernel, body in bodies.items():
        if not kernel.startswith("topk_mask_"):
            continue
        loads, stores = re.findall(r"LDG\.\S+", body), re.findall(r"STG\.\S+", body)
        assert any(".128" in load for load in loads), kernel
        assert any(".128" in store for store in stores), kernel
        if kernel.endswith(("warp2", "warp4", "warp8", "warp16", "block8")):
            assert all(".128" in load for load in loads), kernel
            assert all(".128" in store or ".U8" in store for store in stores), kernel
