"""Arms: changes to the method that are tried on a small model before any becomes a flag.

An arm decides what a TopK layer leaves on the residual stream, and what the next layer's attention
and MLP read of it. docs/design/0013-tax.md says why each was tried, and what came.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.ops import topk_mask


class TopK:
    """The product's method: h = TopK(x), and layers read all that is left.

    Attributes:
        options: The options and their defaults.
        after_norm: Whether `read` is given the output of the norm instead of its input.
    """

    options: ClassVar[dict[str, float]] = {}
    after_norm: ClassVar[bool] = False

    def __init__(self, text: str) -> None:
        """Read the options, as in ``leak=0.5,to=2``."""
        given = dict(pair.split("=") for pair in text.split(",") if pair)
        if unknown := given.keys() - self.options.keys():
            raise SystemExit(f"error: expected options {sorted(self.options)}, got {unknown}")
        self.option = {**self.options, **{name: float(value) for name, value in given.items()}}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return what a TopK layer leaves on the residual stream.

        Args:
            x: [s, b, h], its output.
            before: [s, b, h], its input.
            topk: the current k and the settings.
            layer: its number.
        """
        return topk_mask(x, topk.k, mode=topk.config.mode)

    def read(self, x: Tensor, topk: TopKRuntime) -> Tensor:
        """Return what attention and MLP read of the stream, before their norm, [s, b, h]."""
        return x


class Dense(TopK):
    """Nothing is masked."""

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the output."""
        return x


class Reads(Dense):
    """Sparse reads, dense carry."""

    def read(self, x: Tensor, topk: TopKRuntime) -> Tensor:
        """Return the k largest."""
        return topk_mask(x, topk.k, mode=topk.config.mode)


class Normed(Reads):
    """Sparse reads of the norm's output, which keeps the scale of the whole stream."""

    after_norm = True


class Two(Reads):
    """A state of `times` k neurons, of which each layer reads the k largest."""

    options: ClassVar[dict[str, float]] = {"times": 4}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the `times` k largest."""
        kept = min(x.shape[-1], round(self.option["times"] * topk.k))
        return topk_mask(x, kept, mode=topk.config.mode)


class Leak(Reads):
    """Sparse reads; what is not read is carried on, but multiplied by `by`."""

    options: ClassVar[dict[str, float]] = {"by": 0.5}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the k largest and a share of the others."""
        kept = topk_mask(x, topk.k, mode=topk.config.mode)
        return kept + self.option["by"] * (x - kept)


class Update(TopK):
    """TopK on what a layer writes; the stream is the sum."""

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the input and the k largest of the update."""
        return before + topk_mask(x - before, topk.k, mode=topk.config.mode)


class Shrink(TopK):
    """h = max(x - theta, 0), theta the (k + 1)-th value: continuous in x."""

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the k largest, less the next one."""
        if topk.k >= x.shape[-1]:
            return x
        return torch.relu(x - x.topk(topk.k + 1, dim=-1).values[..., -1:])


class Gate(TopK):
    """A sigmoid around theta, whose temperature falls to 0 with k."""

    options: ClassVar[dict[str, float]] = {"temperature": 0.1}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the gated output; its temperature is in standard deviations of x."""
        heat = self.option["temperature"] * (topk.k / topk.config.k - 1)
        if topk.k >= x.shape[-1] or heat <= 0:
            return topk_mask(x, topk.k)
        last, following = x.topk(topk.k + 1, dim=-1).values[..., -2:].unbind(-1)
        theta = ((last + following) / 2).unsqueeze(-1)
        scale = heat * x.detach().float().std(-1, keepdim=True).to(x.dtype)
        return x * torch.sigmoid((x - theta) / scale)


class Batch(TopK):
    """BatchTopK: k a token on average; a running mean of the threshold in evaluation."""

    def __init__(self, text: str) -> None:
        """Start without a threshold."""
        super().__init__(text)
        self._threshold: dict[int, Tensor] = {}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return all that is above the threshold."""
        if topk.k >= x.shape[-1]:
            return x
        if torch.is_grad_enabled():
            flat = x.detach().float().flatten()
            now = flat.topk(topk.k * flat.numel() // x.shape[-1]).values[-1]
            self._threshold[layer] = 0.99 * self._threshold.get(layer, now) + 0.01 * now
            return x * (x >= now)
        return x * (x >= self._threshold[layer])


class Balance(TopK):
    """Neurons that fire less often than others get a bonus in the selection, `by` deviations."""

    options: ClassVar[dict[str, float]] = {"by": 0.003}

    def __init__(self, text: str) -> None:
        """Start without a bonus."""
        super().__init__(text)
        self._bonus: dict[int, Tensor] = {}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the values of the k largest sums of value and bonus."""
        if topk.k >= x.shape[-1]:
            return x
        values = x.detach().float()
        bonus = self._bonus.setdefault(layer, torch.zeros(x.shape[-1]))
        chosen = (values + bonus).topk(topk.k, dim=-1).indices
        mask = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, chosen, True)
        if torch.is_grad_enabled():
            rate = mask.flatten(0, -2).float().mean(0)
            step = self.option["by"] * values.std()
            bonus += step * torch.sign(topk.k / x.shape[-1] - rate)
        return x * mask


class States(TopK):
    """A TopK after every layer, and another on what the MLP reads, behind attention."""

    read = Reads.read  # of a layer's output, all that is left


class Shared(TopK):
    """The first `count` of the k neurons of a token are the same for all tokens."""

    options: ClassVar[dict[str, float]] = {"count": 4}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the first `count` neurons, and the k - `count` largest of the others."""
        count = int(self.option["count"])
        always, others = x[..., :count], x[..., count:]
        kept = max(1, min(topk.k - count, others.shape[-1]))
        return torch.cat([always, topk_mask(others, kept, mode=topk.config.mode)], dim=-1)


class _Penalised(torch.autograd.Function):
    """The identity, to whose gradient that of a penalty is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor) -> Tensor:
        """Return x."""
        ctx.shape, ctx.dtype = penalty.shape, penalty.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient, and 1 for the penalty, as if it were added to the loss."""
        (gradient,) = gradients
        return gradient, torch.ones(ctx.shape, dtype=ctx.dtype, device=gradient.device)


class Penalty(TopK):
    """`by` times the ratio of L1 to L2 norm before the TopK is added to the loss of each token."""

    options: ClassVar[dict[str, float]] = {"by": 0.01}

    def leave(self, x: Tensor, before: Tensor, topk: TopKRuntime, layer: int) -> Tensor:
        """Return the k largest."""
        if torch.is_grad_enabled():
            values = x.float()
            ratio = values.abs().sum(-1) / values.norm(dim=-1).clamp_min(1e-6)
            x = _Penalised.apply(x, self.option["by"] * ratio.sum())  # pyright: ignore
        return super().leave(x, before, topk, layer)


ARMS = {
    arm.__name__.lower(): arm
    for arm in (
        *(TopK, Dense, Reads, Normed, Two, Leak, Update, Shrink, Gate, Batch, Balance),
        *(States, Shared, Penalty),
    )
}
