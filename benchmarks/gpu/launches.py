"""Launches every kernel of the operator once, for tools that watch launches.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.launches every
    ncu --profile-from-start off … python -m benchmarks.gpu.launches profile

`every` runs each kernel on a few rows of many lengths and compares the results with the definition.
`profile` launches six works on rows that fill the card, each behind a marker kernel, by which
benchmarks/gpu/counters.py tells them apart: one work may be several kernels.

Shape suffixes: R rows, H hidden size, W words of the bitmask.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tests.rows import MODES, as_bits, make_rows
from topk_megatron.ops import pack_sparse, topk_mask_with_bits, unpack_sparse
from topk_megatron.ops.extension import MISSING
from topk_megatron.ops.library import OPS
from topk_megatron.ops.reference import topk_mask_reference, unpack_bits

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Lengths on both sides of every limit at which a kernel may hand over to another: 16-byte rows,
# a warp's registers, a block's, a window of shared memory, and rows that start at odd addresses.
WIDTHS = (1, 7, 33, 64, 256, 512, 1000, 1024, 1032, 2048, 2049, 4096, 4104, 8192, 12288, 16384)
LONG_WIDTHS = (32768, 32776, 70000)
PROFILE_BYTES = 512 << 20  # of x: what the L2 cache still holds at the end is then small
KINDS = ("normal", "few_distinct", "nans")


def cases(quick: bool) -> Iterator[tuple[int, torch.dtype, str, str, int]]:
    """Yield (H, dtype, mode, kind, k); racecheck is slow and takes the quick form."""
    for width in WIDTHS if quick else (*WIDTHS, *LONG_WIDTHS):
        for dtype in DTYPES:
            for mode in MODES:
                ks = {max(1, width // 16)} if quick else {1, max(1, width // 16), width // 2 or 1}
                for kind in KINDS[:1] if quick else KINDS:
                    yield from ((width, dtype, mode, kind, k) for k in sorted(ks))


def launch(x_RH: Tensor, k: int, mode: str) -> tuple[Tensor, ...]:
    """Run forward, backward, pack, unpack and the counts once, and return their results."""
    y_RH, bits_RW = topk_mask_with_bits(x_RH, k, mode=mode)
    dx_RH = OPS.topk_mask_backward(x_RH, bits_RW)
    values, indices = pack_sparse(y_RH, bits_RW, k)
    width = x_RH.shape[-1]
    counts_H = OPS.count_bits(bits_RW, width)
    return y_RH, bits_RW, dx_RH, unpack_sparse(values, indices, width), counts_H


def launch_every(device: str, quick: bool) -> int:
    """Run every case, compare it with the definition, and return the number of cases."""
    count = 0
    for width, dtype, mode, kind, k in cases(quick):
        x_RH = make_rows(kind, (3, width), dtype)
        y_RH, bits_RW, dx_RH, back_RH, counts_H = (
            t.cpu() for t in launch(x_RH.to(device), k, mode)
        )
        wanted_RH, wanted_RW = topk_mask_reference(x_RH, k, mode)
        same = torch.equal(bits_RW, wanted_RW)
        same = same and torch.equal(counts_H, unpack_bits(wanted_RW, width).sum(0))
        for got in (y_RH, dx_RH, back_RH):  # with dy = x, the gradient is y
            same = same and torch.equal(as_bits(got), as_bits(wanted_RH))
        if not same:
            raise SystemExit(f"error: H = {width}, k = {k}, {dtype}, {mode}, {kind} differs")
        count += 1
    return count


def profiled(device: str, num_bytes: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yield six works: a label, the ideal bytes of one launch, and the work."""
    for dtype, width in (
        *((torch.bfloat16, width) for width in (2048, 4096, 8192)),
        (torch.float32, 4096),
    ):
        rows, k = num_bytes // (width * dtype.itemsize), width // 16
        x_RH = make_rows("normal", (rows, width), dtype, 0, device)
        moved = rows * (2 * width * dtype.itemsize + width // 8)
        name = f"{str(dtype).removeprefix('torch.')} H = {width}, k = {k}"
        yield f"forward {name}", moved, partial(OPS.topk_mask, x_RH, k, "value")
        if (dtype, width) == (torch.bfloat16, 4096):
            y_RH, bits_RW = topk_mask_with_bits(x_RH, k)
            packed = pack_sparse(y_RH, bits_RW, k)
            sparse = rows * (k * (2 + 2) + 2 * width)
            gradient = partial(OPS.topk_mask_backward, x_RH, bits_RW)
            yield f"backward {name}", moved, gradient
            yield f"unpack {name}", sparse, partial(unpack_sparse, *packed, width)


def launch_profiled(device: str, num_bytes: int) -> None:
    """Run each work warm, then once under the profiler behind a marker, and print its label."""
    marker = torch.zeros(32, device=device)
    for number, (label, moved, work) in enumerate(profiled(device, num_bytes)):
        work()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        marker.erfinv_()  # no work of ours uses this kernel
        work()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"LAUNCH\t{number}\t{label}\t{moved}", flush=True)


def main() -> None:
    """Run the launches that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("every", "profile"))
    parser.add_argument("--quick", action="store_true", help="fewer lengths and rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bytes", type=int, default=PROFILE_BYTES, help="of x, for profile")
    options = parser.parse_args()
    if (reason := MISSING[options.device]) is not None:
        raise SystemExit(f"error: no {options.device} kernel: {reason}")
    if options.what == "profile":
        launch_profiled(options.device, options.bytes)
    else:
        count = launch_every(options.device, options.quick)
        print(f"{count} cases of forward, backward, pack, unpack and counts equal the definition")


if __name__ == "__main__":
    main()
