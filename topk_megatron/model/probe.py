"""Cheap statistics of one TopK layer on one rank, gathered in the forward pass.

Every step counts how often each neuron was selected, from the bits of S: 32 times fewer bytes than
the layer's output in float32, 16 times fewer in bfloat16. Norms, which need the dense tensors, are
computed only in steps that are logged. Nothing here waits for the device; `take_sums` and
`silent_tokens` are tensors that the caller transfers for all layers at once.

Shapes: N rows, H neurons.
"""

import torch
from torch import Tensor

from topk_megatron.ops.library import OPS

# A rank that does not hold the layer must not win the minimum over ranks.
NEVER_SEEN = torch.iinfo(torch.int64).max // 2


class LayerProbe:
    """Density, kept energy, and tokens since each neuron last fired.

    A neuron fires when it is selected, even if its value is zero.

    Attributes:
        hidden_size: H, the number of neurons.
        measuring: whether the current step adds to the sums of `take_sums`.
        counts: int64 [H]: rows of the current step in which each neuron fired; None before the
            first microbatch.
        num_rows: rows observed in the current step.
        silent_tokens: int64 [H]: tokens of the whole job since each neuron last fired; None before
            the first step.
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.measuring = False
        self.counts: Tensor | None = None
        self.num_rows = 0
        self.silent_tokens: Tensor | None = None
        self._norms: Tensor | None = None
        self._has_norms = False
        self._sums: Tensor | None = None

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor, bits: Tensor | None) -> None:
        """Record one microbatch.

        Args:
            before: [..., H], the input of the TopK.
            after: [..., H], its output.
            bits: int32 [..., ceil(H / 32)], its selection S; None if every neuron is selected.
        """
        # These two are allocated once: the layer may run on another CUDA stream than `end_step`.
        if self.counts is None or self._norms is None:
            self.counts = torch.zeros(self.hidden_size, dtype=torch.int64, device=after.device)
            self._norms = torch.zeros(2, dtype=torch.float64, device=after.device)
        num_rows = after.numel() // self.hidden_size
        self.counts += num_rows if bits is None else OPS.count_bits(bits, self.hidden_size)
        self.num_rows += num_rows
        if self.measuring:
            self._norms += torch.stack([_squared_norm(x.detach()) for x in (after, before)])
            self._has_norms = True

    def end_step(self, tokens: int) -> None:
        """Close a training step of `tokens` tokens over the whole job."""
        if self.counts is None or self._norms is None or self.num_rows == 0:
            return
        if self.silent_tokens is None:
            self.silent_tokens = torch.zeros_like(self.counts)
        self.silent_tokens.add_(tokens).masked_fill_(self.counts > 0, 0)
        if self._has_norms:
            fired = self.counts.sum().double()
            outputs = torch.full_like(fired, self.num_rows * self.hidden_size)
            sums = torch.cat([torch.stack([fired, outputs]), self._norms])
            self._sums = sums if self._sums is None else self._sums + sums
        self._has_norms, self.num_rows = False, 0
        self.counts.zero_()
        self._norms.zero_()

    def take_sums(self, device: torch.device) -> Tensor:
        """Return the sums over the measured steps since the last call, and start again.

        Returns:
            float64 [4]: number of selected outputs, number of outputs, squared norm after the TopK
            and before it; zeros if nothing was measured.
        """
        sums, self._sums = self._sums, None
        return torch.zeros(4, dtype=torch.float64, device=device) if sums is None else sums


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
