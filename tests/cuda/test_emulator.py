"""The emulators' arithmetic equals independent references: torch on CPU and exact fractions."""

import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from snippets import (
    FORMATS,
    THREADS,
    Compile,
    Format,
    exact_fma,
    nasty_patterns,
)

UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
RELATIONS = (*ORDERED, *UNORDERED, "num", "nan")
TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def pairs(f: Format) -> np.ndarray:
    """Return words [N, 3] with every pair of nasty patterns as a and b, and a random c.

    Of a 16-bit format, the upper half holds other pairs than the lower one.
    """
    patterns = nasty_patterns(f)
    a, b = (x.ravel() for x in np.meshgrid(patterns, patterns))
    c = np.random.default_rng(1).choice(patterns, len(a))
    words = np.stack([a, b, c], axis=1)
    if f.bits == 16:
        words = words | np.roll(words, 77, axis=0) << 16
    return np.resize(words, (-(-len(words) // THREADS) * THREADS, 3))


def halves(words: np.ndarray) -> np.ndarray:
    """Return the lower and upper halves of words [...] as [..., 2]."""
    return np.stack([words & 0xFFFF, words >> 16], axis=-1)


def as_floats(patterns: np.ndarray, name: str) -> torch.Tensor:
    integers = np.int32 if name == "f32" else np.int16
    return torch.from_numpy(patterns.astype(np.uint32).astype(integers)).view(TORCH_TYPES[name])


def holds(relation: str, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Compare as IEEE 754 says."""
    unordered = a.isnan() | b.isnan()
    if relation == "nan":
        return unordered.numpy()
    if relation == "num":
        return (~unordered).numpy()
    ordered = getattr(operator, UNORDERED.get(relation, relation))(a, b)
    return (ordered | unordered if relation in UNORDERED else ordered & ~unordered).numpy()


# ---- Comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_packed_comparisons_equal_torch(compiled: Compile, name: str, tmp_path: Path) -> None:
    kinds = {"u32": 0xFFFF, f"{name}x2": 0x3C00 if name == "f16" else 0x3F80}
    bodies = {
        f"{relation}_{kind}": f"set.{relation}.{kind}.{name}x2 %d, %a, %b;"
        for relation in RELATIONS
        for kind in kinds
    }
    bodies |= {
        f"{relation}_setp": f"setp.{relation}.{name}x2 %p|%q, %a, %b;\n"
        "selp.b32 %d, 1, 0, %p; @%q add.u32 %d, %d, 65536;"
        for relation in RELATIONS
    }
    runner, words = compiled(bodies), pairs(FORMATS[name])
    split = halves(words)
    a, b = as_floats(split[:, 0], name), as_floats(split[:, 1], name)
    for relation in RELATIONS:
        expected = holds(relation, a, b)
        for kind, one in {**kinds, "setp": 1}.items():
            got = halves(runner.run(f"{relation}_{kind}", words, tmp_path))
            assert np.array_equal(got, np.where(expected, one, 0)), (relation, kind)


def test_scalar_comparisons_equal_torch(compiled: Compile, tmp_path: Path) -> None:
    bodies = {}
    for relation in RELATIONS:
        bodies[f"{relation}_f32"] = f"set.{relation}.u32.f32 %d, %a, %b;"
        bodies[f"{relation}_p"] = f"setp.{relation}.f32 %p|%q, %a, %b; selp.u32 %d, 1, 0, %q;"
    runner, words = compiled(bodies), pairs(FORMATS["f32"])
    a, b = as_floats(words[:, 0], "f32"), as_floats(words[:, 1], "f32")
    for relation in RELATIONS:
        expected = holds(relation, a, b)
        got = runner.run(f"{relation}_f32", words, tmp_path)
        assert np.array_equal(got, np.where(expected, 0xFFFFFFFF, 0)), relation
        second = runner.run(f"{relation}_p", words, tmp_path)
        assert np.array_equal(second, ~expected), relation


# ---- Arithmetic ---------------------------------------------------------------------------------


def equal_to(reference: Callable[..., int | None], f: Format, got: np.ndarray, *inputs: np.ndarray):
    """Assert that each result is the reference's, or a NaN where it says None."""
    for pattern, *args in zip(got.tolist(), *(x.tolist() for x in inputs), strict=True):
        expected = reference(*args)
        if expected is None:
            assert f.is_nan(pattern), [hex(x) for x in (*args, pattern)]
        else:
            assert pattern == expected, [hex(x) for x in (*args, pattern, expected)]


def split_for(name: str, words: np.ndarray) -> np.ndarray:
    return words if name == "f32" else halves(words).reshape(*words.shape[:-1], -1)


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_arithmetic_is_correctly_rounded(compiled: Compile, name: str, tmp_path: Path) -> None:
    f, kind = FORMATS[name], name if name == "f32" else f"{name}x2"
    one, minus_zero = f.bias << f.mantissa, 1 << (f.bits - 1)
    bodies = {op: f"{op}.{kind} %d, %a, %b;" for op in ("add.rn", "sub.rn", "mul.rn")} | {
        "fma.rn": f"fma.rn.{kind} %d, %a, %b, %c;"
    }
    runner = compiled({op[:3]: body for op, body in bodies.items()})
    words = pairs(f)[: 8 * THREADS]
    a, b, c = (split_for(name, words[:, i, None]).ravel() for i in range(3))
    references = {
        "add": lambda a, b: exact_fma(a, one, b, f),
        "sub": lambda a, b: exact_fma(a, one, b ^ minus_zero, f) if not f.is_nan(b) else None,
        "mul": lambda a, b: exact_fma(a, b, ((a ^ b) & minus_zero), f),
        "fma": lambda a, b, c: exact_fma(a, b, c, f),
    }
    for op, reference in references.items():
        got = split_for(name, runner.run(op, words, tmp_path)[:, None]).ravel()
        equal_to(reference, f, got, a, b, *([c] if op == "fma" else []))


def _extremum(a: int, b: int, f: Format, largest: bool, propagate: bool) -> int | None:
    nans = f.is_nan(a), f.is_nan(b)
    if all(nans) or (propagate and any(nans)):
        return None
    if any(nans):
        return b if nans[0] else a
    order = lambda x: ~x + (1 << f.bits) if x >> (f.bits - 1) else x | 1 << (f.bits - 1)  # noqa: E731
    return (max if largest else min)(a, b, key=order)


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_minimum_and_maximum_order_zeros_and_skip_or_keep_nans(
    compiled: Compile, name: str, tmp_path: Path
) -> None:
    f, kind = FORMATS[name], name if name == "f32" else f"{name}x2"
    bodies = {
        f"{op}{nan}": f"{op}{'.NaN' if nan else ''}.{kind} %d, %a, %b;"
        for op in ("min", "max")
        for nan in ("", "_nan")
    }
    runner, words = compiled(bodies), pairs(f)
    a, b = (split_for(name, words[:, i, None]).ravel() for i in range(2))
    for op in bodies:
        got = split_for(name, runner.run(op, words, tmp_path)[:, None]).ravel()
        equal_to(lambda a, b, op=op: _extremum(a, b, f, op[:3] == "max", "nan" in op), f, got, a, b)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_conversions_round_to_nearest_and_to_zero(
    compiled: Compile, name: str, tmp_path: Path
) -> None:
    f, single = FORMATS[name], FORMATS["f32"]
    bodies = {
        "rn": f"cvt.rn.{name}.f32 %h0, %a; cvt.u32.u16 %d, %h0;",
        "rz": f"cvt.rz.{name}.f32 %h0, %a; cvt.u32.u16 %d, %h0;",
        "packed": f"cvt.rn.{name}x2.f32 %d, %a, %b;",
        "back": f"cvt.u16.u32 %h0, %a; cvt.f32.{name} %d, %h0;",
    }
    runner, words = compiled(bodies), pairs(single)
    tie = np.arange(THREADS, dtype=np.uint32) << 12 | 0x3F800000  # halfway cases of both formats
    words[:THREADS, 0] = tie
    words[THREADS : 2 * THREADS, 0] = tie | 1

    def rounded(pattern: int, to_zero: bool = False) -> int | None:
        sign = pattern >> 31 << 15
        if single.is_nan(pattern):
            return None
        if single.is_infinite(pattern):
            return sign | f.infinity
        value = single.value(pattern)
        return f.round(value, to_zero=to_zero) if value else sign

    a, b = words[:, 0], words[:, 1]
    equal_to(rounded, f, runner.run("rn", words, tmp_path), a)
    equal_to(lambda x: rounded(x, True), f, runner.run("rz", words, tmp_path), a)
    packed = halves(runner.run("packed", words, tmp_path))
    equal_to(rounded, f, packed[:, 1], a)
    equal_to(rounded, f, packed[:, 0], b)
    back = as_floats(runner.run("back", words, tmp_path), "f32")
    expected = as_floats(a & 0xFFFF, name).float()
    assert torch.equal(back.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_saturation_clamps_to_zero_and_one(compiled: Compile, tmp_path: Path) -> None:
    runner = compiled({
        "fma": "fma.rn.sat.f32 %d, %a, %b, %c;", "add": "add.sat.f32 %d, %a, %b;",
    })  # fmt: skip
    words = pairs(FORMATS["f32"])
    a, b, c = (as_floats(words[:, i], "f32").double() for i in range(3))
    for op, exact in {"fma": a * b + c, "add": a + b}.items():
        got = as_floats(runner.run(op, words, tmp_path), "f32")
        expected = exact.nan_to_num(0.0).clamp(0, 1).float()
        assert torch.equal(got, expected), op


# ---- Integers -----------------------------------------------------------------------------------


def _dp(a: int, b: int, c: int, parts: int) -> int:
    width = 32 // parts
    for i in range(parts):
        c += (a >> width * i & (1 << width) - 1) * (b >> 8 * i & 255)
    return c & 0xFFFFFFFF


INTEGER_OPERATIONS: dict[str, tuple[str, Callable[[int, int, int], int]]] = {
    "lop3": ("lop3.b32 %d, %a, %b, %c, 0xca;", lambda a, b, c: (a & b) | (~a & c)),
    "prmt": (
        "prmt.b32 %d, %a, %b, 0x7a41;",
        lambda a, b, c: (a >> 8 & 255) | (b & 255) << 8
        | (0xFF0000 if a >> 23 & 1 else 0) | b >> 24 << 24,
    ),
    "shf": (
        "shf.r.wrap.b32 %d, %a, %b, %c;", lambda a, b, c: (b << 32 | a) >> (c & 31),
    ),
    "bfe": ("bfe.u32 %d, %a, 5, 9;", lambda a, b, c: a >> 5 & 511),
    "bfi": ("bfi.b32 %d, %a, %b, 7, 6;", lambda a, b, c: (b & ~(63 << 7)) | (a & 63) << 7),
    "popc": ("popc.b32 %d, %a;", lambda a, b, c: a.bit_count()),
    "clz": ("clz.b32 %d, %a;", lambda a, b, c: 32 - a.bit_length()),
    "bfind": ("bfind.u32 %d, %a;", lambda a, b, c: a.bit_length() - 1),
    "brev": ("brev.b32 %d, %a;", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    "dp4a": ("dp4a.u32.u32 %d, %a, %b, %c;", lambda a, b, c: _dp(a, b, c, 4)),
    "dp2a": ("dp2a.lo.u32.u32 %d, %a, %b, %c;", lambda a, b, c: _dp(a, b, c, 2)),
    "mad_hi": ("mad.hi.u32 %d, %a, %b, %c;", lambda a, b, c: (a * b >> 32) + c),
    "max_s32": (
        "max.s32 %d, %a, %b;", lambda a, b, c: max(a, b, key=lambda x: x - (x >> 31 << 32)),
    ),
    "add64": (
        "mov.b64 %w0, {{%a, %b}}; mov.b64 %w1, {{%b, %c}}; add.s64 %w2, %w0, %w1;"
        "mov.b64 {{%t0, %d}}, %w2;".replace("{{", "{").replace("}}", "}"),
        lambda a, b, c: ((b << 32 | a) + (c << 32 | b)) >> 32,
    ),
}  # fmt: skip


def test_integer_operations_equal_python(compiled: Compile, tmp_path: Path) -> None:
    runner = compiled({name: body for name, (body, _) in INTEGER_OPERATIONS.items()})
    random = np.random.default_rng(2)
    words = random.integers(0, 2**32, (2 * THREADS, 3), dtype=np.uint32)
    words[:40] = random.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], (40, 3))
    for name, (_, reference) in INTEGER_OPERATIONS.items():
        got = runner.run(name, words, tmp_path)
        for result, row in zip(got.tolist(), words.tolist(), strict=True):
            assert result == reference(*row) & 0xFFFFFFFF, (name, [hex(x) for x in row])
