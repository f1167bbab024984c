"""Messages reproduce the tensors bit for bit, and have the size that both sides compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rows import INTEGERS, KINDS, as_bits, make_rows
from topk_megatron.errors import VerificationError
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.verify import Verifier
from topk_megatron.parallel.wire import (
    WireFormat,
    pack_gradient,
    pack_hidden,
    unpack_gradient,
    unpack_hidden,
    wire_format,
)

WIRED = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(WIRED),
    hidden=st.sampled_from([1, 31, 64, 200, 300, 1000]),
    rows=st.integers(1, 5),
    share=st.floats(0, 1),
    bitmask=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_arrives_is_what_was_sent(
    kind: str, dtype: torch.dtype, hidden: int, rows: int, share: float, bitmask: bool, seed: int
) -> None:
    k = max(1, round(share * hidden))
    wire = WireFormat(hidden_size=hidden, k=k, dtype=dtype, bitmask=bitmask)
    x, bits = topk_mask_with_bits(make_rows(kind, (rows, hidden), dtype, seed).unsqueeze(1), k)
    message, sent = pack_hidden(wire, x, bits)
    assert message.numel() == wire.message_bytes(rows)
    out = torch.empty_like(x).requires_grad_()
    received = unpack_hidden(wire, message, out)
    assert torch.equal(as_bits(out.detach()), as_bits(x))
    assert torch.equal(received, sent)

    dx = make_rows(kind, (rows, hidden), dtype, seed + 1).unsqueeze(1)
    gradient = pack_gradient(dx, received)
    assert gradient.numel() == wire.values_bytes(rows)
    out = torch.empty_like(x)
    unpack_gradient(wire, gradient, sent, out)
    wanted = torch.ops.topk_megatron.topk_mask_backward(dx, bits)
    assert torch.equal(as_bits(out), as_bits(wanted))


@pytest.mark.parametrize(
    ("hidden", "k", "dtype", "forward", "backward"),
    [
        (2048, 128, torch.bfloat16, 8.0, 16.0),
        (2048, 128, torch.float32, 10.0, 16.0),
        (4096, 32, torch.bfloat16, 64.0, 128.0),  # indices: 64 bytes against a mask of 512
    ],
)
def test_messages_are_as_small_as_promised(
    hidden: int, k: int, dtype: torch.dtype, forward: float, backward: float
) -> None:
    wire = wire_format(hidden, k, dtype)
    assert wire is not None
    dense = 100 * hidden * dtype.itemsize
    assert dense / wire.message_bytes(100) >= forward
    assert dense / wire.values_bytes(100) >= backward


@given(hidden=st.integers(1, 5000), share=st.floats(0, 1), dtype=st.sampled_from(WIRED))
def test_the_smaller_form_is_chosen_and_dense_where_neither_halves(
    hidden: int, share: float, dtype: torch.dtype
) -> None:
    k = max(1, round(share * hidden))
    sizes = []
    for bitmask in (False, True):
        wire = WireFormat(hidden_size=hidden, k=k, dtype=dtype, bitmask=bitmask)
        sizes.append(k * dtype.itemsize + wire.selection_bytes)
    chosen = wire_format(hidden, k, dtype)
    if chosen is None:
        assert 2 * min(sizes) > hidden * dtype.itemsize
    else:
        assert k * dtype.itemsize + chosen.selection_bytes == min(sizes)


def test_verification_detects_a_single_wrong_bit() -> None:
    wire = wire_format(256, 16, torch.float32)
    assert wire is not None
    x, bits = topk_mask_with_bits(torch.randn(3, 256), 16)
    verifier = Verifier(every=2)
    verifier.begin(4)
    message, indices = pack_hidden(wire, x, bits)
    size = message.numel()
    sent = verifier.extend(message, x)
    out = torch.empty_like(x)
    assert sent.numel() == verifier.buffer(size, out).numel()
    unpack_hidden(wire, verifier.strip(sent, size), out)
    verifier.check_hidden(sent, size, out)
    as_bits(out)[1, 7] ^= 1
    with pytest.raises(VerificationError, match=r"step 4 .* hidden states .* in 1 bytes"):
        verifier.check_hidden(sent, size, out)

    dx = torch.randn(3, 256)
    gradient = pack_gradient(dx, indices)
    size, sent = gradient.numel(), verifier.extend(gradient, dx)
    unpack_gradient(wire, verifier.strip(sent, size), indices, out)
    verifier.check_gradient(sent, size, out, indices)
    out.view(INTEGERS[4])[0, int(indices[0, 0])] ^= 1
    with pytest.raises(VerificationError, match="gradients"):
        verifier.check_gradient(sent, size, out, indices)
    assert verifier.take_counts() == {"hidden states": 1, "gradients": 1, "saved activations": 0}


def test_steps_that_are_not_verified_send_nothing_extra() -> None:
    message, dense = torch.zeros(5, dtype=torch.uint8), torch.zeros(2, 8)
    verifier = Verifier(every=2)
    verifier.begin(3)
    assert verifier.extend(message, dense) is message
    assert verifier.buffer(5, dense).numel() == 5
