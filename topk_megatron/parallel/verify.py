"""``--topk-verify N``: every N steps, sparse forms are compared with the dense tensors at run time.

In a verified step the dense tensor follows a sparse message in the same buffer, and the receiver
compares the unpacked tensor with it, bit for bit. A saved activation keeps its dense tensor too.
Both sides know from the iteration whether a step is verified.
"""

import torch
from torch import Tensor

from topk_megatron.errors import VerificationError
from topk_megatron.ops.library import OPS
from topk_megatron.parallel.wire import aligned


class Verifier:
    """Compares sparse forms with dense tensors in verified steps, and counts the comparisons.

    Attributes:
        every: number of steps from one verified step to the next; None verifies nothing.
        active: whether the current step is verified.
        equal: number of tensors found equal since the last `take_counts`, by kind.
    """

    def __init__(self, every: int | None) -> None:
        """Verify every `every`-th step, or none if `every` is None."""
        self.every = every
        self.active = False
        self._iteration = 0
        self.equal = {"hidden states": 0, "gradients": 0, "saved activations": 0}

    def begin(self, iteration: int) -> None:
        """Open the step numbered `iteration`, counted from 0."""
        self._iteration = iteration
        self.active = self.every is not None and iteration % self.every == 0

    def take_counts(self) -> dict[str, int]:
        """Return `equal` and start counting again."""
        counts, self.equal = self.equal, dict.fromkeys(self.equal, 0)
        return counts

    def extend(self, message: Tensor, dense: Tensor) -> Tensor:
        """Append the dense tensor to a message if the step is verified."""
        if not self.active:
            return message
        padding = message.new_zeros(aligned(message.numel()) - message.numel())
        return torch.cat([message, padding, _as_bytes(dense)])

    def buffer(self, size: int, dense: Tensor) -> Tensor:
        """Return an empty buffer for a message of `size` bytes and the dense tensor behind it."""
        if self.active:
            size = aligned(size) + dense.numel() * dense.element_size()
        return torch.empty(size, dtype=torch.uint8, device=dense.device)

    def strip(self, buffer: Tensor, size: int) -> Tensor:
        """Return the message without the dense tensor behind it."""
        return buffer[:size]

    def check_hidden(self, buffer: Tensor, size: int, x: Tensor) -> None:
        """Compare an unpacked hidden state with the dense one behind the message."""
        if self.active:
            self.check("hidden states", x, buffer[aligned(size) :].view(x.dtype).view(x.shape))

    def check_gradient(self, buffer: Tensor, size: int, dx: Tensor, indices_NK: Tensor) -> None:
        """Compare an unpacked gradient with the dense one on S; the TopK discards the rest."""
        if self.active:
            rows = indices_NK.shape[0]
            dense = buffer[aligned(size) :].view(dx.dtype).view(rows, -1)
            wanted = OPS.scatter_row(OPS.gather_row(dense, indices_NK), indices_NK, dense.shape[1])
            self.check("gradients", dx, wanted.view(dx.shape))

    def check(self, kind: str, got: Tensor, wanted: Tensor) -> None:
        """Compare two tensors bitwise.

        Raises:
            VerificationError: if they differ.
        """
        differ = _as_bytes(got) != _as_bytes(wanted)
        if bool(differ.any()):
            raise VerificationError(
                f"--topk-verify: in step {self._iteration} (counted from 0) {kind} of shape "
                f"{tuple(got.shape)} differ from their dense form in {int(differ.sum())} bytes; "
                "this is a bug: drop --topk-sparse-p2p and --topk-sparse-save, and report it"
            )
        self.equal[kind] += 1


def _as_bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)
