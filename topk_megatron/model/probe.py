"""Cheap statistics of one TopK layer on one rank, gathered in the forward pass.

Every step records which neurons fired; norms are computed only in steps that are logged.
"""

import torch
from torch import Tensor

# A rank that does not hold the layer must not win the minimum over ranks.
NEVER_SEEN = torch.iinfo(torch.int64).max // 2


class LayerProbe:
    """Density, kept energy, and tokens since each neuron last fired.

    Attributes:
        hidden_size: h, the number of neurons.
        measuring: whether `observe` also adds to `sums`.
        sums: float64 [4]: number of nonzero outputs, number of outputs, squared norm after the TopK
            and before it; None until measured.
        silent_tokens: int64 [h]: tokens of the whole job since each neuron was last nonzero; None
            before the first step.
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.measuring = False
        self.sums: Tensor | None = None
        self.silent_tokens: Tensor | None = None
        self._fired: Tensor | None = None

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor) -> None:
        """Record one microbatch.

        Activation recomputation observes a microbatch twice, which changes none of the ratios.

        Args:
            before: [..., h], the input of the TopK.
            after: [..., h], its output.
        """
        rows = after.detach().reshape(-1, self.hidden_size)
        # Two passes, yet ten times cheaper on a CPU than any() or a norm over this dimension.
        fired = (rows.amax(dim=0) != 0) | (rows.amin(dim=0) != 0)
        self._fired = fired if self._fired is None else self._fired | fired
        if self.measuring:
            sums = torch.stack(
                [
                    torch.count_nonzero(rows).double(),
                    torch.full((), rows.numel(), dtype=torch.float64, device=rows.device),
                    _squared_norm(rows),
                    _squared_norm(before.detach()),
                ]
            )
            self.sums = sums if self.sums is None else self.sums + sums

    def end_step(self, tokens: int) -> None:
        """Close a training step of `tokens` tokens over the whole job."""
        if self._fired is None:
            return
        if self.silent_tokens is None:
            self.silent_tokens = torch.zeros(
                self.hidden_size, dtype=torch.int64, device=self._fired.device
            )
        # In place and without reading values back, so that nothing waits for the device.
        self.silent_tokens.add_(tokens).masked_fill_(self._fired, 0)
        self._fired = None

    def take_sums(self, device: torch.device) -> Tensor:
        """Return `sums` and clear them; return zeros if nothing was measured."""
        sums, self.sums = self.sums, None
        return torch.zeros(4, dtype=torch.float64, device=device) if sums is None else sums


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
