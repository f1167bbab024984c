"""The sparse transport between two pipeline stages, both in this process: pack, move, unpack.

    python -m benchmarks.gpu.transport --output transport.json

Stage 1 packs a TopK hidden state as it would send it, the message is copied within the card, and
stage 2 unpacks it; then a gradient travels back. Everything is compared bitwise. Times are of each
part, beside the dense copy that the packing replaces. Real links are slower than the card's memory,
so these times say what packing costs, not what it saves.

Shape suffixes: R rows, H hidden size, K kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Work, measure
from tests.rows import as_bits, make_rows
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel import wire

SHAPES = ((2048, 128), (4096, 256), (8192, 512), (4096, 64))
DTYPE = torch.bfloat16
ROWS = 16384  # tokens of a microbatch: sequence times microbatch size
SETS = 4


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two floating tensors have the same bits."""
    return torch.equal(as_bits(a), as_bits(b))


def loop(device: str, hidden_size: int, k: int, rows: int) -> bool:
    """Send one hidden state and its gradient there and back; return whether every bit arrived."""
    format = wire.wire_format(hidden_size, k, DTYPE)
    assert format is not None, "these shapes are sparse enough to pack"
    equal = True
    for kind in ("normal", "zeros_of_both_signs", "nans"):
        x_RH = make_rows(kind, (rows, hidden_size), DTYPE, 0, device)
        y_RH, bits = topk_mask_with_bits(x_RH, k)
        sent, indices_RK = wire.pack_hidden(format, y_RH, bits)
        received_RH = torch.full_like(y_RH, 3.0)
        there_RK = wire.unpack_hidden(format, sent.clone(), received_RH)
        gradient = wire.pack_gradient(x_RH, there_RK)
        wanted_RH, back_RH = torch.zeros_like(x_RH), torch.full_like(x_RH, 3.0)
        wire.unpack_gradient(format, gradient.clone(), indices_RK, back_RH)
        wanted_RH.view(torch.int16).scatter_(
            -1, indices_RK.long(), x_RH.view(torch.int16).gather(-1, indices_RK.long())
        )
        equal = equal and same(received_RH, y_RH) and same(back_RH, wanted_RH)
    return equal


def works_of(device: str, hidden_size: int, k: int, rows: int, sets: int) -> dict[str, Work]:
    """Return the parts of the transport as works over buffer sets."""
    format = wire.wire_format(hidden_size, k, DTYPE)
    assert format is not None
    shape = (rows, hidden_size)
    xs = [make_rows("normal", shape, DTYPE, seed, device) for seed in range(sets)]
    selected = [topk_mask_with_bits(x, k) for x in xs]
    sent = [wire.pack_hidden(format, *pair) for pair in selected]
    outs = [torch.empty_like(x) for x in xs]
    gradients = [wire.pack_gradient(x, pair[1]) for x, pair in zip(xs, sent, strict=True)]
    return {
        "dense copy": lambda n: outs[n].copy_(selected[n][0]),
        "pack": lambda n: wire.pack_hidden(format, *selected[n]),
        "message copy": lambda n: sent[n][0].clone(),
        "unpack": lambda n: wire.unpack_hidden(format, sent[n][0], outs[n]),
        "pack gradient": lambda n: wire.pack_gradient(xs[n], sent[n][1]),
        "unpack gradient": lambda n: wire.unpack_gradient(
            format, gradients[n], sent[n][1], outs[n]
        ),
    }


def line(hidden_size: int, k: int) -> dict[str, Any]:
    """Compare and time one shape on the GPU."""
    format = wire.wire_format(hidden_size, k, DTYPE)
    assert format is not None
    works = works_of("cuda", hidden_size, k, ROWS, SETS)
    times = measure(works, sets=SETS, repeats=21)
    return {
        "hidden_size": hidden_size,
        "k": k,
        "rows": ROWS,
        "equal": loop("cuda", hidden_size, k, ROWS),
        "message_bytes": format.message_bytes(ROWS),
        "dense_bytes": ROWS * hidden_size * DTYPE.itemsize,
        "us": {name: found.median * 1e6 for name, found in times.items()},
    }


def main() -> None:
    """Measure every shape, and exit with status 1 if a bit was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device")
    lines = [line(*shape) for shape in SHAPES]
    lost = [f"H = {x['hidden_size']}, k = {x['k']}" for x in lines if not x["equal"]]
    first = lines[1]
    share = first["message_bytes"] / first["dense_bytes"]
    us = first["us"]
    headline = (
        f"bitwise equal; H = 4096, k = 256: {share:.1%} of the dense bytes, pack {us['pack']:.0f}"
        f" us, unpack {us['unpack']:.0f} us, dense copy {us['dense copy']:.0f} us"
    )
    if lost:
        headline = f"DIFFERENT: {'; '.join(lost)}"
    options.output.write_text(json.dumps({"headline": headline, "shapes": lines}, indent=1))
    print(headline)
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
