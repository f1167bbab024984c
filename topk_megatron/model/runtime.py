"""State that the TopK layers of one model share: settings, the current k, probes, selections."""

from collections import Counter

import torch
from torch import Tensor

from topk_megatron.config import TopKConfig, k_at
from topk_megatron.model.probe import LayerProbe
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.selection import Selection, SelectionRegistry

# A place of a TopK: "residual stream" or "MLP", and the number of its layer.
Site = tuple[str, int]


class TopKRuntime:
    """Holds the current k, and the probes and selections of the TopK layers on this rank.

    One object serves all model chunks of a rank. Whatever runs a step calls `begin_step` once
    before it; everything else only reads `k`.

    Attributes:
        config: settings of the model.
        probing: whether layers gather statistics.
        probes: statistics of each TopK layer on this rank, by layer number.
        k: number of neurons that survive in the current step.
        selections: registry of the selections S, for transport and saving.
        sites: the TopK sites on this rank.
        applications: how often each site was applied, by whether its layer was training; a layer
            that runs twice for recomputation counts twice.
    """

    def __init__(self, config: TopKConfig, *, probing: bool = True) -> None:
        """Start with the k of the first step.

        Args:
            config: settings of the model.
            probing: whether to gather statistics.
        """
        self.config = config
        self.probing = probing
        self.probes: dict[int, LayerProbe] = {}
        self.k = k_at(config, 0)
        self.selections = SelectionRegistry()
        self.sites: list[Site] = []
        self.applications: dict[bool, Counter[Site]] = {True: Counter(), False: Counter()}

    def begin_step(self, iteration: int, *, measuring: bool = False) -> None:
        """Set k, which nothing else does, and forget the previous step's selections.

        Args:
            iteration: number of the step, counted from 0.
            measuring: whether the probes also compute norms in this step.
        """
        self.k = k_at(self.config, iteration)
        self.selections.clear()
        for probe in self.probes.values():
            probe.measuring = measuring

    def register(self, layer: int) -> None:
        """Register a TopK layer of this rank, numbered from 0 over the whole model."""
        if layer in self.config.mlp_layers:
            self.sites.append(("MLP", layer))
        if layer in self.config.residual_layers:
            self.sites.append(("residual stream", layer))
            self.probes[layer] = LayerProbe(self.config.hidden_size)

    def count(self, place: str, layer: int, training: bool) -> None:
        """Record that a site was applied once."""
        self.applications[training][place, layer] += 1

    def left_out(self, *, training: bool) -> list[Site]:
        """Return the sites on this rank that were never applied, in training or in evaluation."""
        return [site for site in self.sites if not self.applications[training][site]]

    def apply(self, hidden_states: Tensor, layer: int, *, training: bool) -> Tensor:
        """Apply the TopK over the hidden dimension.

        Args:
            hidden_states: [s, b, h] or any [..., h], the layer's output after its residual add.
            layer: number of the layer, counted from 0.
            training: whether to update the layer's probe; evaluation does not. Neither does the
                first pass of a recomputed layer, which runs without gradients, so that each
                microbatch is observed once.

        Returns:
            The k largest neurons of each token, +0 elsewhere; same shape and dtype.
        """
        self.count("residual stream", layer, training)
        output, bits = self._select(hidden_states)
        if training and self.probing and torch.is_grad_enabled():
            self.probes[layer].observe(hidden_states, output, bits)
        return output

    def _select(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the TopK and the bits of S, or None where every neuron is selected."""
        if self.k >= hidden_states.shape[-1]:
            return hidden_states, None
        output, bits = topk_mask_with_bits(hidden_states, self.k, mode=self.config.mode)
        if self.selections.active:
            self.selections.remember(output, Selection(output.shape, self.k, bits=bits))
        return output, bits
