"""What the TopK layers of one model share as they run: settings, current k, probes."""

from torch import Tensor

from topk_megatron.config import TopKConfig
from topk_megatron.model.probe import LayerProbe
from topk_megatron.ops import topk_mask
from topk_megatron.schedule import k_at


class TopKRuntime:
    """Holds the current k, and a probe for each TopK layer on this rank.

    One object is shared by all model chunks of a rank. The training step calls `begin_iteration`
    before its first microbatch; layers only read.
    """

    def __init__(self, config: TopKConfig, *, probing: bool = True) -> None:
        """Args: config: validated settings. probing: False switches the statistics off."""
        self.config = config
        self.probing = probing
        self.probes: dict[int, LayerProbe] = {}
        self.k = k_at(config, 0)

    def begin_iteration(self, iteration: int) -> None:
        """Set k for the step numbered `iteration`, counted from 0."""
        self.k = k_at(self.config, iteration)

    def register(self, layer: int) -> None:
        """Announce a TopK layer built on this rank, numbered from 0 over the whole model."""
        if layer in self.config.residual_layers:
            self.probes[layer] = LayerProbe(self.config.hidden_size)

    def apply(self, hidden_states: Tensor, layer: int, *, training: bool) -> Tensor:
        """TopK over the hidden dimension.

        Args:
            hidden_states: [s, b, h] or any [..., h], the layer's output after its residual add.
            layer: number of the layer, counted from 0.
            training: whether to update the layer's probe; evaluation leaves it alone.
        """
        output = topk_mask(hidden_states, self.k, mode=self.config.mode)
        if training and self.probing:
            self.probes[layer].observe(hidden_states, output)
        return output
