"""ptxas's machine code for sm_90, executed on CPU: its results and its instructions by pipe."""

from pathlib import Path

import pytest
import torch
from count import HIDDEN, NUM_ROWS, SHARES, Count, Shape, count_shapes, parse_k
from emulated import DTYPES
from hopper import HALF_COMPARE, PIPES
from machine_code import Program, Toolchain
from runner import SECTOR_BYTES, Backward, Forward, check_sparse_rows, run_cases

from tests.rows import KINDS, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

# Of a normal row, per element: thread instructions in the ALU, comparisons of halves included
# because nobody says where they run, and issued in all. The memory of an H100 leaves time for 17.7
# and 35.4 of them where an element has two bytes, that of an H200 for 12.7 and 25.3; for twice as
# many where it has four bytes.
LIMITS = {
    "bfloat16": {"ALU": 12.6, "issue": 25},
    "float16": {"ALU": 12.6, "issue": 25},
    "float32": {"ALU": 25, "issue": 50},
}
SHORT_ROW = 1024  # has few elements to share the scalar work of a row: within the H100's limits
SHORT_ROW_LIMITS = {"bfloat16": {"ALU": 17, "issue": 35}, "float16": {"ALU": 17, "issue": 35}}
MOST_FOR_UNUSUAL_ROWS = 1.5  # times a normal row
UNUSUAL = ("few_distinct", "relu", "zeros_of_both_signs", "all_equal", "ascending")
UNUSUAL_SHARE = "H/16"
BYTES_PER_LOAD = 512  # of a warp, 16 a lane

shape_parameters = pytest.mark.parametrize(
    ("dtype", "hidden"), [(dtype, hidden) for dtype in LIMITS for hidden in HIDDEN]
)


@pytest.fixture(scope="module")
def sass(toolchain: Toolchain, cuobjdump: str) -> Program:
    return toolchain.sass_program(cuobjdump)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sass_equals_the_reference(sass: Program, dtype: str, tmp_path: Path) -> None:
    cases = []
    for hidden in (1, 40, 256, 777, 1024, 2048, 2304, 4096, 8192):
        for kind in KINDS:
            x_RH = make_rows(kind, (2 if hidden < 1000 else 1, hidden), DTYPES[dtype], seed=hidden)
            modes = ("value", "abs") if kind in ("normal", "nans") else ("value",)
            for k in sorted({1, (hidden + 15) // 16, (hidden + 1) // 2}):
                cases += [Forward(x_RH, k, mode) for mode in modes]
    for case, outcome in zip(cases, run_cases(sass, cases, tmp_path), strict=True):
        y_RH, bits = topk_mask_reference(case.x_RH, case.k, case.mode)
        about = f"{outcome.counters.kernel}, k={case.k}, {tuple(case.x_RH.shape)}"
        assert torch.equal(as_bits(outcome.out_RH), as_bits(y_RH)), f"y differs: {about}"
        assert outcome.bits is not None
        assert torch.equal(outcome.bits, bits), f"bits differ: {about}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sass_of_backward_equals_the_reference(sass: Program, dtype: str, tmp_path: Path) -> None:
    cases = []
    for hidden in (1, 33, 1024, 2049, 4096):
        x_RH = make_rows("few_distinct", (5, hidden), DTYPES[dtype], seed=hidden)
        bits = topk_mask_reference(x_RH, (hidden + 2) // 3, "value")[1]
        cases.append(Backward(make_rows("random_bits", (5, hidden), DTYPES[dtype], seed=1), bits))
    for case, outcome in zip(cases, run_cases(sass, cases, tmp_path), strict=True):
        kept_RH = unpack_bits(case.bits, case.dy_RH.shape[1])
        expected_RH = torch.where(kept_RH, as_bits(case.dy_RH), 0)
        assert torch.equal(as_bits(outcome.out_RH), expected_RH), outcome.counters.kernel


def test_sass_of_sparse_rows_equals_the_reference(sass: Program, tmp_path: Path) -> None:
    check_sparse_rows(sass, tmp_path)


@pytest.fixture(scope="module")
def counted(sass: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, Count]:
    """Count normal rows for each share of k, and unusual rows for one."""
    shapes = [
        Shape(dtype, hidden, parse_k(share, hidden), kind)
        for dtype in LIMITS
        for hidden in HIDDEN
        for share in SHARES
        for kind in ("normal", *(UNUSUAL if share == UNUSUAL_SHARE else ()))
    ]
    counts = count_shapes(sass, shapes, tmp_path_factory.mktemp("counted"))
    return dict(zip(shapes, counts, strict=True))


def _sum(counters_opcodes: dict[str, int], opcode: str) -> int:
    return sum(n for name, n in counters_opcodes.items() if name.split(".")[0] == opcode)


@shape_parameters
def test_counts_agree_with_what_a_row_needs(
    counted: dict[Shape, Count], dtype: str, hidden: int
) -> None:
    most_reread = 4 / NUM_ROWS  # the first rows of a block's four warps
    for shape, count in counted.items():
        if (shape.dtype, shape.hidden) != (dtype, hidden):
            continue
        counters, rows = count.counters, count.num_rows
        assert sum(counters.opcodes.values()) == counters.warp_instructions
        assert sum(count.pipes[pipe] for pipe in PIPES if pipe != "FMA heavy") == pytest.approx(
            count.issued
        )
        row_bytes = hidden * DTYPES[dtype].itemsize
        # A jump over a gap reads the row again, from a cache; a first row needs one at times.
        loads, needed = _sum(counters.opcodes, "LDG"), rows * row_bytes // BYTES_PER_LOAD
        assert needed <= loads, shape
        assert shape.kind != "normal" or loads <= needed + most_reread * needed, shape
        assert loads == counters.load_requests
        assert _sum(counters.opcodes, "STG") == counters.store_requests
        assert counters.load_sectors == loads * BYTES_PER_LOAD // SECTOR_BYTES
        assert counters.store_sectors == rows * (row_bytes + hidden // 8) // SECTOR_BYTES


@shape_parameters
def test_a_normal_row_stays_within_the_instruction_budget(
    counted: dict[Shape, Count], dtype: str, hidden: int
) -> None:
    for share in SHARES:
        count = counted[Shape(dtype, hidden, parse_k(share, hidden))]
        short = hidden == SHORT_ROW and dtype in SHORT_ROW_LIMITS
        limits = SHORT_ROW_LIMITS[dtype] if short else LIMITS[dtype]
        assert count.pipes["ALU"] + count.pipes[HALF_COMPARE] <= limits["ALU"], share
        assert count.issued <= limits["issue"], share


@shape_parameters
def test_unusual_rows_cost_at_most_half_again(
    counted: dict[Shape, Count], dtype: str, hidden: int
) -> None:
    k = parse_k(UNUSUAL_SHARE, hidden)
    normal = counted[Shape(dtype, hidden, k)]
    for kind in UNUSUAL:
        unusual = counted[Shape(dtype, hidden, k, kind)]
        assert unusual.issued <= MOST_FOR_UNUSUAL_ROWS * normal.issued, kind
        assert unusual.pipes["ALU"] <= MOST_FOR_UNUSUAL_ROWS * normal.pipes["ALU"], kind


@shape_parameters
def test_nothing_serialises_banks_or_needs_atomics(
    counted: dict[Shape, Count], dtype: str, hidden: int
) -> None:
    for shape, count in counted.items():
        if (shape.dtype, shape.hidden) == (dtype, hidden):
            assert count.counters.atomic_requests == 0, shape
            assert count.counters.shared_wavefronts == count.counters.shared_requests, shape
