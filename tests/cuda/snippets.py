"""Kernels of a few PTX instructions, and exact references for float formats.

Every thread of a snippet reads three words into %a, %b and %c and writes the word %d.
"""

import math
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

WORDS_IN = 3
THREADS = 128
HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
ENTRY = """
.visible .entry {name}(.param .u64 in_, .param .u64 out_)
{{
  .reg .b64 %in, %out, %offset;
  .reg .b32 %a, %b, %c, %d, %thread, %size, %block, %index;
  .reg .b16 %h<16>;
  .reg .b32 %t<16>;
  .reg .b64 %w<8>;
  .reg .pred %p, %q;
  ld.param.u64 %in, [in_];
  ld.param.u64 %out, [out_];
  cvta.to.global.u64 %in, %in;
  cvta.to.global.u64 %out, %out;
  mov.u32 %thread, %tid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %block, %ctaid.x;
  mad.lo.u32 %index, %block, %size, %thread;
  mul.wide.u32 %offset, %index, 12;
  add.u64 %offset, %in, %offset;
  ld.global.b32 %a, [%offset];
  ld.global.b32 %b, [%offset+4];
  ld.global.b32 %c, [%offset+8];
  {body}
  mul.wide.u32 %offset, %index, 4;
  add.u64 %offset, %out, %offset;
  st.global.b32 [%offset], %d;
  ret;
}}
"""


def module(bodies: dict[str, str], declarations: str = "") -> str:
    """Return the PTX of one kernel per body."""
    entries = (ENTRY.format(name=name, body=body) for name, body in bodies.items())
    return HEADER + declarations + "".join(entries)


@dataclass(frozen=True)
class SnippetRunner:
    """Runs the kernels of one program file in an emulator."""

    driver: Path
    program: Path

    def try_run(
        self, kernel: str, words: np.ndarray, folder: Path, blocks: int | None = None
    ) -> tuple[np.ndarray, subprocess.CompletedProcess[str]]:
        """Return the output words, and how the process ended."""
        threads = len(words)
        blocks = blocks or -(-threads // THREADS)
        source, target = folder / f"{kernel}.in", folder / f"{kernel}.out"
        source.write_bytes(words.astype(np.uint32).tobytes())
        target.write_bytes(b"")
        line = f"{kernel} {blocks} 1 {threads // blocks} 1 {source} {target} {4 * threads}\n"
        command = [str(self.driver), str(self.program)]
        result = subprocess.run(command, input=line, capture_output=True, text=True, check=False)
        return np.fromfile(target, dtype=np.uint32), result

    def run(self, kernel: str, words: np.ndarray, folder: Path) -> np.ndarray:
        """Return the output words of a kernel that must not stop or warn."""
        assert words.shape[1] == WORDS_IN
        out, result = self.try_run(kernel, words, folder)
        assert result.returncode == 0, result.stderr
        assert not result.stderr, result.stderr
        return out


class Compile(Protocol):
    """Prepares kernels, given as PTX, for execution in the emulator."""

    def __call__(self, bodies: dict[str, str], declarations: str = "") -> SnippetRunner: ...


# ---- Exact references ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A binary float format."""

    bits: int
    mantissa: int

    @property
    def bias(self) -> int:
        return 2 ** (self.bits - self.mantissa - 2) - 1

    @property
    def infinity(self) -> int:
        return (2 ** (self.bits - self.mantissa - 1) - 1) << self.mantissa

    def is_nan(self, pattern: int) -> bool:
        return pattern & (2 ** (self.bits - 1) - 1) > self.infinity

    def is_infinite(self, pattern: int) -> bool:
        return pattern & (2 ** (self.bits - 1) - 1) == self.infinity

    def value(self, pattern: int) -> Fraction:
        """Return a finite pattern's value."""
        fraction = pattern & (2**self.mantissa - 1)
        exponent = pattern >> self.mantissa & (self.infinity >> self.mantissa)
        if exponent:
            fraction += 2**self.mantissa
        size = Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa) * fraction
        return -size if pattern >> (self.bits - 1) else size

    def round(self, x: Fraction, *, to_zero: bool = False) -> int:
        """Return the pattern of x != 0, rounded to nearest even or to zero."""
        sign = (x < 0) << (self.bits - 1)
        x = abs(x)
        exponent = max(_floor_log2(x), 1 - self.bias)
        units = x / Fraction(2) ** (exponent - self.mantissa)
        whole = math.floor(units) if to_zero else round(units)  # Python rounds to even
        pattern = ((exponent + self.bias - 1) << self.mantissa) + whole
        return sign | min(pattern, self.infinity - to_zero)


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


HALF, BRAIN, SINGLE = Format(16, 10), Format(16, 7), Format(32, 23)
FORMATS = {"f16": HALF, "bf16": BRAIN, "f32": SINGLE}


def exact_fma(a: int, b: int, c: int, f: Format) -> int | None:
    """Return the pattern of a * b + c, or None for NaN."""
    if any(map(f.is_nan, (a, b, c))):
        return None
    top = f.bits - 1
    product_sign = (a ^ b) >> top & 1
    if f.is_infinite(a) or f.is_infinite(b):
        other = b if f.is_infinite(a) else a
        zero_times = not f.is_infinite(other) and f.value(other) == 0
        clash = f.is_infinite(c) and c >> top != product_sign
        return None if zero_times or clash else product_sign << top | f.infinity
    if f.is_infinite(c):
        return c
    result = f.value(a) * f.value(b) + f.value(c)
    if result:
        return f.round(result)
    return (product_sign & c >> top) << top if f.value(c) == 0 else 0


def nasty_patterns(f: Format, seed: int = 0) -> np.ndarray:
    """Return zeros, denormals, ones, largest values, infinities, NaNs and random patterns."""
    one = f.bias << f.mantissa
    positive = [0, 1, 2, (1 << f.mantissa) - 1, 1 << f.mantissa, one - 1, one, one + 1,
                one + (1 << f.mantissa) // 2, one + (1 << f.mantissa), f.infinity - 1, f.infinity,
                f.infinity + 1, f.infinity + (1 << f.mantissa) - 1]  # fmt: skip
    negative = [x | 1 << (f.bits - 1) for x in positive]
    random = np.random.default_rng(seed).integers(0, 2**f.bits, 20)
    return np.array([*positive, *negative, *random], dtype=np.uint32)
