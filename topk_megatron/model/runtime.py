"""What the TopK layers of one model share as they run: settings, current k, probes."""

from torch import Tensor

from topk_megatron.config import TopKConfig, k_at
from topk_megatron.model.probe import LayerProbe
from topk_megatron.ops import topk_mask, topk_mask_with_bits
from topk_megatron.parallel.saved import SparseSaver


class TopKRuntime:
    """Holds the current k, and a probe for each TopK layer on this rank.

    One object is shared by all model chunks of a rank. The training step calls `begin_iteration`
    before its first microbatch; layers only read.
    """

    def __init__(self, config: TopKConfig, *, probing: bool = True) -> None:
        """Args: config: validated settings. probing: False switches the statistics off.

        Set `keeps_selection` to have `selection_of` answer, and `saver` to save outputs sparsely.
        """
        self.config = config
        self.probing = probing
        self.probes: dict[int, LayerProbe] = {}
        self.k = k_at(config, 0)
        self.keeps_selection = False
        self.saver: SparseSaver | None = None
        self._last: tuple[int, Tensor] | None = None

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
        output = self._select(hidden_states)
        if training and self.probing:
            self.probes[layer].observe(hidden_states, output)
        return output

    def selection_of(self, output: Tensor) -> Tensor | None:
        """The bitmask of a TopK output, if it is the last that was made; asked once."""
        last, self._last = self._last, None
        return last[1] if last is not None and last[0] == output.data_ptr() else None

    def _select(self, hidden_states: Tensor) -> Tensor:
        wanted = self.keeps_selection or self.saver is not None
        if not wanted or self.k >= hidden_states.shape[-1]:
            return topk_mask(hidden_states, self.k, mode=self.config.mode)
        output, bits = topk_mask_with_bits(hidden_states, self.k, mode=self.config.mode)
        if self.keeps_selection:
            self._last = output.data_ptr(), bits
        if self.saver is not None:
            self.saver.remember(output, bits, self.k)
        return output
