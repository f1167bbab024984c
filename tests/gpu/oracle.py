"""Compares every bit of the operator with an oracle on the device, until its time is up.

    python -m tests.gpu.oracle --seconds 60 --output oracle.json

The definition in topk_megatron/ops/reference.py needs a stable sort, which is too slow for millions
of rows on a CPU. This oracle is written differently: each coordinate becomes one integer, its key
followed by its distance from the end of the row. All integers of a row differ, so that any sort
will do, and one sort serves every k. Both oracles are compared with each other, too.

Shape suffixes: R rows, H hidden size, W words of the bitmask.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.rows import KINDS, MODES, as_bits, infinity_bits, interesting_ks, make_rows
from topk_megatron.ops import pack_sparse, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.extension import MISSING
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
WIDTHS = (4096, 1024, 2048, 8192, 1000, 2049, 5120, 12288, 16384, 7, 333)
ROWS = 16384
# A first round of few rows reaches every combination; the second one runs until time is up.
FIRST_ROWS = 512
CHUNK_ELEMENTS = 1 << 26
INDEX_BITS = 20  # H is at most 2^20


def ordered_keys(x: Tensor, mode: str) -> Tensor:
    """Return distinct int64 keys [..., H]; the largest k of a row are its selection.

    The upper part orders values: NaN above all, -0 equal to +0. The lower part prefers low indices.
    """
    bits = as_bits(x).to(torch.int64)
    magnitude = bits & ((1 << 8 * x.element_size() - 1) - 1)
    infinity = infinity_bits(x.dtype)
    sign = torch.ones_like(bits) if mode == "abs" else torch.where(bits < 0, -1, 1)
    value = torch.where(magnitude > infinity, infinity + 1, sign * magnitude)
    from_end = (1 << INDEX_BITS) - 1 - torch.arange(x.shape[-1], device=x.device)
    return (value << INDEX_BITS) + from_end


@dataclass
class Found:
    """What one run compared, and the first differences.

    Attributes:
        rows: rows compared, each at one k.
        cases: combinations of kind, dtype, H, mode and k.
        rounds: combinations of kind, dtype, H and mode reached by round one and by round two.
        differences: the first ten, in words.
    """

    rows: int = 0
    cases: int = 0
    rounds: list[int] = field(default_factory=lambda: [0, 0])
    differences: list[str] = field(default_factory=list)

    def note(self, same: bool, what: str, case: str) -> None:
        """Record a comparison that failed."""
        if not same and len(self.differences) < 10:
            self.differences.append(f"{what} differs: {case}")


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two floating tensors have the same bits."""
    return torch.equal(as_bits(a), as_bits(b))


def compare_batch(found: Found, x_RH: Tensor, mode: str, ks: list[int], case: str) -> None:
    """Compare the selection, y, the gradient, and packing there and back, at every k."""
    keys_RH = ordered_keys(x_RH, mode)
    sorted_RH = keys_RH.sort(dim=-1, descending=True).values
    zero = torch.zeros((), dtype=x_RH.dtype, device=x_RH.device)
    dy_RH = x_RH.flip(0)
    for k in ks:
        at = f"{case}, k = {k}"
        wanted_RH = keys_RH >= sorted_RH[:, k - 1 : k]
        y_RH, bits_RW = topk_mask_with_bits(x_RH, k, mode=mode)
        got_RH = unpack_bits(bits_RW, x_RH.shape[-1])
        found.note(torch.equal(got_RH, wanted_RH), "selection", at)
        found.note(no_bits_behind(bits_RW, x_RH.shape[-1]), "the bits behind H", at)
        found.note(equal_bits(y_RH, torch.where(wanted_RH, x_RH, zero)), "y", at)
        dx_RH = OPS.topk_mask_backward(dy_RH, bits_RW)
        found.note(equal_bits(dx_RH, torch.where(wanted_RH, dy_RH, zero)), "gradient", at)
        values, indices = pack_sparse(y_RH, bits_RW, k)
        back_RH = unpack_sparse(values, indices, x_RH.shape[-1])
        found.note(equal_bits(back_RH, y_RH), "packed and unpacked", at)
        found.rows += len(x_RH)
        found.cases += 1
    few_RH, k = x_RH[:4].cpu(), ks[len(ks) // 2]
    definition = unpack_bits(topk_mask_reference(few_RH, k, mode)[1], x_RH.shape[-1])
    ours = (keys_RH[:4] >= sorted_RH[:4, k - 1 : k]).cpu()
    found.note(torch.equal(definition, ours), "the definition", f"{case}, k = {k}")


def no_bits_behind(bits_RW: Tensor, hidden_size: int) -> bool:
    """Return whether the bits of the last word that stand for no coordinate are 0."""
    used = hidden_size % 32
    return used == 0 or not bool((bits_RW[:, -1] >> used & ((1 << 32 - used) - 1)).any())


def combinations() -> Iterator[tuple[int, torch.dtype, str, str]]:
    """Yield every (H, dtype, mode, kind), the widths that models use first."""
    for width, dtype, mode in itertools.product(WIDTHS, DTYPES, MODES):
        for kind in KINDS:
            yield width, dtype, mode, kind


def run(device: str, seconds: float, rows: tuple[int, int] = (FIRST_ROWS, ROWS)) -> Found:
    """Compare until every combination had both rounds, time is up or ten differences are known."""
    found, started = Found(), time.monotonic()
    for number, count in enumerate(rows):
        for seed, (width, dtype, mode, kind) in enumerate(combinations()):
            chunk = max(1, min(count, CHUNK_ELEMENTS // width))
            for begin in range(0, count, chunk):
                if time.monotonic() - started > seconds or len(found.differences) >= 10:
                    return found
                shape = (min(chunk, count - begin), width)
                x_RH = make_rows(kind, shape, dtype, seed + begin, device)
                case = f"{kind}, {dtype}, H = {width}, {mode}, seed {seed + begin}"
                compare_batch(found, x_RH, mode, interesting_ks(width), case)
            found.rounds[number] += 1
    return found


def main() -> None:
    """Compare, write what was covered, and exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="when to stop")
    parser.add_argument("--output", type=Path, help="JSON file of what was compared")
    options = parser.parse_args()
    if (reason := MISSING[options.device]) is not None:
        raise SystemExit(f"error: the oracle needs the {options.device} kernel: {reason}")
    found = run(options.device, options.seconds)
    total = len(list(combinations()))
    headline = (
        f"{found.rows:,} rows of {found.cases:,} cases equal; rounds of {FIRST_ROWS} and {ROWS}"
        f" rows reached {found.rounds[0]} and {found.rounds[1]} of {total} combinations"
    )
    if found.differences:
        headline = "DIFFERENT: " + "; ".join(found.differences)
    print(headline)
    if options.output is not None:
        report: dict[str, Any] = {"headline": headline, "combinations": total, **asdict(found)}
        options.output.write_text(json.dumps(report, indent=1))
    raise SystemExit(bool(found.differences))


if __name__ == "__main__":
    main()
