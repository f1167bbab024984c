"""The CPU kernels equal the reference bitwise, on every instruction set that this CPU has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rows import (
    DTYPES,
    KINDS,
    MODES,
    as_bits,
    assert_matches_reference,
    from_bits,
    interesting_ks,
    make_rows,
)
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

SIZES = (1, 2, 31, 32, 33, 64, 127, 500, 512, 1000, 1024, 2048, 3001, 4096)
OP = torch.ops.topk_megatron


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_matches_the_reference(
    isa: str, kind: str, dtype: torch.dtype, mode: str
) -> None:
    for hidden_size in SIZES:
        x = make_rows(kind, (3, hidden_size), dtype)
        for k in interesting_ks(hidden_size):
            assert_matches_reference(x, k, mode)


@pytest.mark.parametrize("hidden_size", [8191, 8192, 16384, 65537])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_long_rows_match_the_reference(isa: str, dtype: torch.dtype, hidden_size: int) -> None:
    for kind in ("normal", "quantised", "mostly_zero", "random_bits"):
        x = make_rows(kind, (2, hidden_size), dtype)
        for k in (1, 128, 512, hidden_size - 1):
            assert_matches_reference(x, k, "value")


@st.composite
def hostile_rows(draw: st.DrawFn) -> tuple[Tensor, int, str]:
    """Draw rows over a small alphabet of random bits: ties, NaN and zeros meet at the threshold."""
    dtype = draw(st.sampled_from(DTYPES))
    width = 8 * dtype.itemsize
    alphabet = draw(
        st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=1, max_size=40)
    )
    hidden_size = draw(st.integers(1, 16_384) | st.integers(1, 70) | st.integers(500, 1100))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # Squared, so that some patterns are frequent and some are rare.
    pick = torch.rand(2, hidden_size, generator=generator).square() * len(alphabet)
    x = from_bits(torch.tensor(alphabet)[pick.long()], dtype)
    k = draw(st.integers(1, hidden_size) | st.sampled_from([1, max(1, hidden_size - 1)]))
    return x, k, draw(st.sampled_from(MODES))


def test_hostile_rows_match_the_reference(isa: str) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(hostile_rows())
    def check(case: tuple[Tensor, int, str]) -> None:
        assert_matches_reference(*case)

    check()


def rows_unlike_each_other(
    seed: int, num_rows: int, hidden_size: int, dtype: torch.dtype
) -> Tensor:
    """Return rows [R, H] in runs of random length, each run of another kind and scale."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    while sum(len(part) for part in parts) < num_rows:
        kind, length, exponent = (
            int(torch.randint(limit, (), generator=generator)) for limit in (len(KINDS), 12, 9)
        )
        part = make_rows(KINDS[kind], (length + 1, hidden_size), dtype, seed + len(parts))
        parts.append(part * 2.0 ** (exponent - 4))
    return torch.cat(parts)[:num_rows]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_before_it(
    isa: str, dtype: torch.dtype, mode: str
) -> None:
    for seed, hidden_size in enumerate((40, 512, 2048, 3001)):
        x = rows_unlike_each_other(seed, 60, hidden_size, dtype)
        for k in interesting_ks(hidden_size):
            assert_matches_reference(x, k, mode)


@pytest.mark.parametrize("offset", [1, 3, 16, 31])
def test_rows_at_any_alignment_match_the_reference(isa: str, offset: int) -> None:
    for dtype in DTYPES:
        buffer = make_rows("normal", (1, 4 * 2048 + offset), dtype)[0]
        assert_matches_reference(buffer[offset:].view(4, 2048), 100, "value")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [2048, 2049])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_outputs_larger_than_the_cache_match_the_reference(
    isa: str, threads: None, num_threads: int, hidden_size: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(num_threads)
    num_rows = (6 << 20) // (hidden_size * dtype.itemsize)  # non-temporal stores from 2 MiB on
    for kind in ("normal", "few_distinct"):
        x = make_rows(kind, (num_rows, hidden_size), dtype)
        assert_matches_reference(x, 128, "value")
        _, bits = topk_mask_reference(x, 128, "value")
        dx = OP.topk_mask_backward(x, bits)
        assert torch.equal(as_bits(dx), as_bits(x) * unpack_bits(bits, hidden_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "random_bits"])
def test_backward_is_dy_on_the_selection_and_plus_zero_elsewhere(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    for hidden_size in SIZES:
        dy = make_rows(kind, (3, hidden_size), dtype, seed=1)
        for k in interesting_ks(hidden_size):
            _, bits = topk_mask_reference(make_rows("normal", (3, hidden_size), dtype), k, "value")
            dx = OP.topk_mask_backward(dy, bits)
            assert torch.equal(as_bits(dx), as_bits(dy) * unpack_bits(bits, hidden_size))


def test_denormals_are_told_apart_when_torch_flushes_them(isa: str) -> None:
    x = make_rows("denormals", (4, 1000), torch.float32)
    wanted_y, wanted_bits = topk_mask_reference(x, 100, "value")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        y, bits = OP.topk_mask(x, 100, "value")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits, wanted_bits)
    assert torch.equal(as_bits(y), as_bits(wanted_y))


def test_results_do_not_depend_on_threads_or_run(isa: str, threads: None) -> None:
    x = make_rows("few_distinct", (300, 1000), torch.bfloat16)
    results = []
    for num_threads in (1, 2, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(OP.topk_mask(x, 77, "abs"))
    for y, bits in results[1:]:
        assert torch.equal(as_bits(y), as_bits(results[0][0]))
        assert torch.equal(bits, results[0][1])


def test_nothing_is_written_outside_the_outputs(isa: str) -> None:
    for dtype in DTYPES:
        for hidden_size in (1, 33, 97, 1000, 1024):
            x = make_rows("normal", (3, hidden_size), dtype)
            guard, num_words = 64, (hidden_size + 31) // 32
            y = torch.full((3 * hidden_size + 2 * guard,), 7.0, dtype=dtype)
            bits = torch.full((3 * num_words + 2 * guard,), 7, dtype=torch.int32)
            torch.ops.topk_megatron_internal.forward_out(
                x,
                max(1, hidden_size // 3),
                "value",
                y[guard:-guard].view(3, hidden_size),
                bits[guard:-guard].view(3, num_words),
            )
            for out in (y, bits):
                assert bool((out[:guard] == 7).all() and (out[-guard:] == 7).all())
