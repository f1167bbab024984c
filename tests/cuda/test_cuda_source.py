"""The CUDA source, executed thread by thread on CPU, equals the stable-sort reference bitwise."""

import subprocess
from pathlib import Path

import pytest
import torch
from emulated import DTYPES, HERE, EmulatedKernels, build, find_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rows import KINDS, as_bits, make_rows
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

MODES = ("value", "abs")
SHORT = (
    1,
    2,
    3,
    5,
    7,
    8,
    15,
    16,
    31,
    32,
    33,
    40,
    63,
    64,
    65,
    100,
    127,
    128,
    255,
    256,
    257,
    512,
    777,
)
LONG = (1000, 1024, 1536, 2047, 2048, 2304, 2560, 4096, 4097, 5120)
VERY_LONG = (8192, 11008, 16383, 16384)


def check(kernels: EmulatedKernels, x_RH: Tensor, k: int, mode: str, seed: int = 0) -> str:
    """Compare y and bits with the reference; return the variant that ran."""
    y_RH, bits, variant = kernels.forward(x_RH, k, mode, seed=seed)
    expected_y_RH, expected_bits = topk_mask_reference(x_RH, k, mode)
    about = f"{variant}, k={k}, {mode}, {x_RH.dtype}, {tuple(x_RH.shape)}"
    assert torch.equal(as_bits(y_RH), as_bits(expected_y_RH)), f"y differs: {about}"
    assert torch.equal(bits, expected_bits), f"bits differ: {about}"
    return variant


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_short_rows_equal_the_reference(
    kernels: EmulatedKernels, kind: str, dtype: str, mode: str
) -> None:
    for hidden in SHORT:
        x_RH = make_rows(kind, (6, hidden), DTYPES[dtype], seed=hidden)
        for k in {1, max(hidden // 8, 1), max(hidden - 1, 1), hidden}:
            check(kernels, x_RH, k, mode, seed=k)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_equal_the_reference(
    kernels: EmulatedKernels, kind: str, dtype: str, mode: str
) -> None:
    for hidden in LONG:
        x_RH = make_rows(kind, (2, hidden), DTYPES[dtype], seed=hidden)
        for k in (1, 3, 24, 128, hidden // 3, hidden - 1, hidden):
            check(kernels, x_RH, k, mode, seed=k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_very_long_rows_equal_the_reference(
    kernels: EmulatedKernels, kind: str, dtype: str
) -> None:
    for hidden in VERY_LONG:
        x_RH = make_rows(kind, (1, hidden), DTYPES[dtype], seed=hidden)
        for k in (64, 700, hidden - 1):
            check(kernels, x_RH, k, "value", seed=k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_65536_equal_the_reference(kernels: EmulatedKernels, dtype: str) -> None:
    for hidden in (65535, 65536):
        for kind in ("normal", "few_distinct"):
            check(kernels, make_rows(kind, (1, hidden), DTYPES[dtype], seed=1), 512, "value")


def test_every_variant_is_reached(kernels: EmulatedKernels) -> None:
    shapes = (256, 1024, 2048, 4096, 8192, 2049)
    x = [make_rows("normal", (5, hidden), torch.bfloat16, seed=1) for hidden in shapes]
    ran = [check(kernels, x_RH, 16, "value") for x_RH in x]
    assert ran == ["warp2", "warp4", "warp8", "warp16", "block8", "stream"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_that_starts_off_16_bytes_is_read_and_written_correctly(
    kernels: EmulatedKernels, dtype: str
) -> None:
    flat = make_rows("normal", (1, 2 * 512 + 1), DTYPES[dtype], seed=3)[0]
    assert check(kernels, flat[1:].view(2, 512), 32, "value") == "stream"


@pytest.mark.parametrize("hidden", [512, 4096, 8192, 4097])
def test_what_a_row_says_about_the_next_changes_no_result(
    kernels: EmulatedKernels, hidden: int
) -> None:
    """One block takes turns on rows whose thresholds are nothing like the forecast."""
    for dtype in DTYPES.values():
        rows = [make_rows(kind, (1, hidden), dtype, seed=hidden) for kind in KINDS]
        x_RH = torch.cat([rows[i % len(rows)] for i in range(0, 5 * len(rows), 5)])
        x_RH[::3] *= 1000
        check(kernels, x_RH, hidden // 16, "value")


def test_few_values_far_apart_and_a_useless_forecast(kernels: EmulatedKernels) -> None:
    spread = torch.tensor([-3e38, -1e20, -1e-20, 0.0, 1e-30, 1.0, 3e38])
    for k in range(1, 7):
        for value in (3e38, -3e38, 1e-38, 0.0):
            for same in (7, 4, 2):
                other = torch.where(torch.arange(7) < same, torch.tensor(value), -spread)
                check(kernels, torch.stack([spread, other, spread, other.flip(0)]), k, "value")


@pytest.mark.parametrize("hidden", [2048, 4096, 4097])
@pytest.mark.parametrize("kind", ["normal", "few_distinct", "ascending", "all_equal"])
def test_any_schedule_of_warps_and_lanes_gives_the_same_result(
    kernels: EmulatedKernels, kind: str, hidden: int
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x_RH = make_rows(kind, (2, hidden), dtype, seed=hidden)
        for seed in range(12):
            check(kernels, x_RH, 128, "value", seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 32, 33, 100, 511, 1024, 2049, 4096, 12288])
def test_backward_keeps_the_gradient_on_the_selection_bitwise(
    kernels: EmulatedKernels, hidden: int, dtype: str
) -> None:
    x_RH = make_rows("zeros_of_both_signs", (9, hidden), DTYPES[dtype], seed=hidden)
    _, bits = topk_mask_reference(x_RH, max(hidden // 3, 1), "value")
    dy_RH = make_rows("random_bits", (9, hidden), DTYPES[dtype], seed=hidden + 1)
    dx_RH = kernels.backward(dy_RH, bits)
    expected_RH = torch.where(unpack_bits(bits, hidden), as_bits(dy_RH), 0)
    assert torch.equal(as_bits(dx_RH), expected_RH)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Tensor, int, str]:
    hidden = draw(st.one_of(st.integers(1, 300), st.integers(1, 3000)))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    width = 8 * dtype.itemsize
    # A small alphabet of arbitrary bit patterns makes ties of any value likely.
    alphabet = draw(st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=1))
    seed = draw(st.integers(0, 2**31 - 1))
    index = torch.randint(
        0, len(alphabet), (2, hidden), generator=torch.Generator().manual_seed(seed)
    )
    bits = torch.tensor(alphabet, dtype=torch.int32 if width == 32 else torch.int16)[index]
    return bits.view(dtype), draw(st.integers(1, hidden)), draw(st.sampled_from(MODES))


@settings(max_examples=200, deadline=None)
@given(case=_cases(), seed=st.integers(0, 1000))
def test_any_row_equals_the_reference(
    kernels: EmulatedKernels, case: tuple[Tensor, int, str], seed: int
) -> None:
    x_RH, k, mode = case
    check(kernels, x_RH, k, mode, seed=seed)


def test_no_access_leaves_its_buffer_and_nothing_is_undefined(tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler (g++, c++, clang++ or $CXX): the CUDA source is not executed")
    flags = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(
        tmp_path / "check_bounds", flags=flags, source=HERE / "emulation" / "check_bounds.cpp"
    )
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:4000]
