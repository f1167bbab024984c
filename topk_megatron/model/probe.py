"""Cheap statistics of one TopK layer on one rank, gathered in the forward pass.

Every step looks which neurons fired; the norms are taken only in the steps that will be logged.
"""

import torch
from torch import Tensor

# Neurons of a rank that does not hold the layer must not win the minimum over ranks.
NEVER_SEEN = torch.iinfo(torch.int64).max // 2


class LayerProbe:
    """Density, kept energy, and tokens since each neuron last fired.

    Attributes:
        sums: float64 [4]: nonzero outputs, outputs, squared norm kept, squared norm before.
        silent_tokens: int64 [h]: tokens, counted over the whole job, since the neuron was nonzero.
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.measuring = False
        self.sums: Tensor | None = None
        self.silent_tokens: Tensor | None = None
        self._fired: Tensor | None = None

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor) -> None:
        """Take note of one microbatch; before and after: [..., h].

        Recomputation of activations observes a microbatch twice, which changes none of the ratios.
        """
        rows = after.detach().reshape(-1, self.hidden_size)
        # Two reads, and still ten times cheaper on a CPU than any() or a norm over this dimension.
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
        # In place and without a read-back: nothing here waits for the device.
        self.silent_tokens.add_(tokens).masked_fill_(self._fired, 0)
        self._fired = None

    def take_sums(self, device: torch.device) -> Tensor:
        """Return and clear `sums`; zeros where nothing was measured."""
        sums, self.sums = self.sums, None
        return torch.zeros(4, dtype=torch.float64, device=device) if sums is None else sums


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
