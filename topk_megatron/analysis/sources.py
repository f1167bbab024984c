"""Where activations come from: a TopK LM, a dense LM under the same rule, or a SAE on a dense LM.

Every source gives the same thing for a batch of token ids: the values and numbers of the k
selected neurons of each recorded layer. Legend: B sequences, S positions, K survivors, N neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from topk_megatron.analysis.hooks import reading_layers
from topk_megatron.config import parse_layers
from topk_megatron.errors import AnalysisError, CheckpointError
from topk_megatron.hf.model import OpenModel
from topk_megatron.ops import pack_sparse, topk_mask_with_bits

# A layer's values [B * S, K] float32 and neuron numbers [B * S, K], of any integer type.
States = dict[int, tuple[Tensor, Tensor]]


class ActivationSource(Protocol):
    """What `record` reads.

    Attributes:
        kind: ``topk``, ``dense`` or ``sae``.
        folder: the model.
        layers: recorded layers, ascending.
        width: neurons of a layer.
        k: survivors a token.
        mode: ``value`` or ``abs``.
        sae: what a manifest says of the SAE; None without one.
    """

    kind: str
    folder: OpenModel
    layers: tuple[int, ...]
    width: int
    k: int
    mode: str
    sae: dict[str, Any] | None

    def states(self, tokens_BS: Tensor) -> States:
        """The selected neurons of every recorded layer, rows in the order of the tokens."""
        ...


@dataclass
class TopKSource:
    """A TopK LM: the states are what its own TopK lets pass."""

    folder: OpenModel
    layers: tuple[int, ...]
    kind: str = "topk"
    sae: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        topk = self.folder.topk
        self.width, self.k, self.mode = self.folder.hidden_size, topk["k"], topk["mode"]

    @torch.inference_mode()
    def states(self, tokens_BS: Tensor) -> States:
        """See `ActivationSource`."""
        model = self.folder.model
        with model.sparse_states(layers=self.layers) as recorded:
            model.model(tokens_BS, use_cache=False)
            return {
                layer: (state.values.float().flatten(0, 1), state.indices.flatten(0, 1))
                for layer, state in ((layer, recorded[layer]) for layer in self.layers)
            }


@dataclass
class DenseSource:
    """A dense LM: the k largest of each hidden state, by the TopK LM's rule and operator."""

    folder: OpenModel
    layers: tuple[int, ...]
    k: int
    mode: str = "value"
    kind: str = "dense"
    sae: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.width = self.folder.hidden_size
        if not 1 <= self.k <= self.width:
            raise AnalysisError(f"--k must be in [1, {self.width}], got {self.k}")

    @torch.inference_mode()
    def states(self, tokens_BS: Tensor) -> States:
        """See `ActivationSource`."""
        found: States = {}

        def read(layer: int, hidden: Tensor) -> None:
            found[layer] = select(hidden.flatten(0, 1), self.k, self.mode)

        with reading_layers(self.folder.model, self.layers, read):
            self.folder.model.model(tokens_BS, use_cache=False)
        return found


class SAESource:
    """Latents of SAELens SAEs on a dense LM, one for each layer."""

    kind: str = "sae"
    mode: str = "value"

    def __init__(self, folder: OpenModel, saes: dict[int, Any], described: dict[str, Any]) -> None:
        self.folder, self.saes = folder, saes
        self.sae: dict[str, Any] | None = described
        self.layers = tuple(sorted(saes))
        widths = {sae.cfg.d_sae for sae in saes.values()}
        ks = {getattr(sae.cfg, "k", None) for sae in saes.values()}
        if len(widths) != 1 or len(ks) != 1 or None in ks:
            raise CheckpointError("the SAEs must be TopK SAEs of one width and one k")
        self.width: int = widths.pop()
        self.k: int = int(ks.pop() or 0)
        for layer, sae in saes.items():
            if sae.cfg.d_in != folder.hidden_size:
                raise CheckpointError(
                    f"the SAE of layer {layer} reads {sae.cfg.d_in} numbers, the model in "
                    f"{folder.path} has hidden size {folder.hidden_size}; it is another model's"
                )

    @torch.inference_mode()
    def states(self, tokens_BS: Tensor) -> States:
        """See `ActivationSource`."""
        found: States = {}

        def read(layer: int, hidden: Tensor) -> None:
            latents = self.saes[layer].encode(hidden.flatten(0, 1).float())
            found[layer] = select(latents, self.k, "value")

        with reading_layers(self.folder.model, self.layers, read):
            self.folder.model.model(tokens_BS, use_cache=False)
        return found


def select(x_TN: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    """The k selected values [T, k] float32 of each row and their coordinates, ascending."""
    y, bits = topk_mask_with_bits(x_TN.contiguous(), k, mode=mode)
    values, indices = pack_sparse(y, bits, min(k, x_TN.shape[-1]))
    return values.float(), indices


def choose_layers(folder: OpenModel, text: str | None) -> tuple[int, ...]:
    """Layers to record: those asked for, else the TopK ones, else all but the last two.

    Raises:
        ConfigError: not a layer list, or out of range.
        AnalysisError: a layer without TopK was asked for of a TopK LM.
    """
    if text is None:
        if folder.topk_layers:
            return folder.topk_layers
        return parse_layers(f"all,-{min(2, folder.num_layers - 1)}", folder.num_layers)
    layers = parse_layers(text, folder.num_layers)
    if not layers:
        raise AnalysisError("--layers names no layer to record")
    without = [layer for layer in layers if layer not in folder.topk_layers]
    if folder.topk_layers and without:
        raise AnalysisError(
            f"layer {without[0]} of {folder.path} has no TopK; its TopK layers are "
            f"{', '.join(map(str, folder.topk_layers))}"
        )
    return layers


def make_source(
    folder: OpenModel,
    *,
    layers: str | None = None,
    k: int | None = None,
    mode: str = "value",
    sae: Sequence[Path] = (),
) -> ActivationSource:
    """The source for a model folder, by what it holds.

    Args:
        folder: the model.
        layers: layer list as in ``--topk-layers``; None chooses.
        k: survivors a token; needed for a dense model, refused for a TopK LM.
        mode: ``value`` or ``abs``, for a dense model.
        sae: directories of SAEs, as `sae` writes them.

    Raises:
        AnalysisError: a model without TopK and no k; a k for a TopK LM; SAEs for a TopK LM.
    """
    if folder.topk_layers:
        if k is not None or sae:
            what = "--sae is" if sae else "--k is"
            raise AnalysisError(
                f"{what} for dense models; {folder.path} has TopK layers of its own"
            )
        return TopKSource(folder, choose_layers(folder, layers))
    if sae:
        from topk_megatron.analysis.sae.saved import load_saes

        saes, described = load_saes(sae)
        wanted = choose_layers(folder, layers) if layers else tuple(sorted(saes))
        missing = sorted(set(wanted) - set(saes))
        if missing:
            raise AnalysisError(f"there is no SAE for layer {missing[0]} among those given")
        device = folder.device
        chosen = {layer: saes[layer].to(device) for layer in wanted}
        return SAESource(folder, chosen, {**described, "layers": sorted(chosen)})
    if k is None:
        raise AnalysisError(
            f"the model in {folder.path} has no TopK layers; give --k to record the k largest "
            "neurons of each hidden state by the same rule, or --sae for the latents of a SAE"
        )
    return DenseSource(folder, choose_layers(folder, layers), k, mode)
