"""Where activations come from: a TopK LM, a dense LM under the same rule, or an SAE on a dense LM.

Every source returns the same for a batch of token ids: the values and numbers of the k selected
neurons of each recorded layer. The last part reads and changes the outputs of whole decoder layers,
for models that have no TopK.

Legend: B sequences, S positions, T tokens (B * S), K survivors, N neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from topk_megatron.config import parse_layers
from topk_megatron.errors import AnalysisError, CheckpointError
from topk_megatron.hf.model import OpenModel
from topk_megatron.ops import pack_sparse, topk_mask_with_bits

# By layer, the values [T, K] float32 and the neurons [T, K] of any integer type.
States = dict[int, tuple[Tensor, Tensor]]


class ActivationSource(Protocol):
    """What `record` reads.

    Attributes:
        kind: ``topk``, ``dense`` or ``sae``.
        folder: the model.
        layers: the layers to record, ascending.
        width: neurons per layer.
        k: survivors per token.
        mode: ``value`` or ``abs``.
        sae: the manifest's entry about the SAE; None without one.
    """

    kind: str
    folder: OpenModel
    layers: tuple[int, ...]
    width: int
    k: int
    mode: str
    sae: dict[str, Any] | None

    def states(self, tokens_BS: Tensor) -> States:
        """Return the selected neurons of every recorded layer, rows in the order of the tokens."""
        ...


@dataclass
class TopKSource:
    """A TopK LM: the states that pass its own TopK."""

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
    """The latents of SAELens SAEs on a dense LM, one SAE per layer."""

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
                    f"{folder.path} has hidden size {folder.hidden_size}; give an SAE that was "
                    "trained on this model"
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
    """Return the k selected values [T, K] float32 of each row and their neurons, ascending."""
    y, bits = topk_mask_with_bits(x_TN.contiguous(), k, mode=mode)
    values, indices = pack_sparse(y, bits, min(k, x_TN.shape[-1]))
    return values.float(), indices


def choose_layers(folder: OpenModel, text: str | None) -> tuple[int, ...]:
    """Return the layers to record: those asked for, else the TopK ones, else all but the last two.

    Raises:
        ConfigError: `text` is not a layer list, or a layer is out of range.
        AnalysisError: a layer of a TopK LM was asked for that has no TopK.
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
    """Return the source that fits the model of a folder.

    Args:
        folder: the model.
        layers: a layer list as in ``--topk-layers``; None chooses.
        k: survivors per token; needed for a dense model, refused for a TopK LM.
        mode: ``value`` or ``abs``, for a dense model.
        sae: directories of SAEs, as the command `sae` writes them.

    Raises:
        AnalysisError: a dense model came without k, or a TopK LM with k or SAEs.
    """
    if folder.topk_layers:
        if k is not None or sae:
            what = "--sae is" if sae else "--k is"
            raise AnalysisError(
                f"{what} for dense models; {folder.path} has TopK layers of its own"
            )
        return TopKSource(folder, choose_layers(folder, layers))
    if sae:
        from topk_megatron.analysis.sae.training import load_saes

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
            "neurons of each hidden state by the same rule, or --sae for the latents of an SAE"
        )
    return DenseSource(folder, choose_layers(folder, layers), k, mode)


def _hidden(output: Any) -> Tensor:
    # Decoder layers of transformers return a tensor (5.x) or a tuple that begins with it (4.x).
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def reading_layers(
    model: Any, layers: Sequence[int], read: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `read(layer, hidden [b, s, H])` with the output of each of these layers."""

    def make(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: read(layer, _hidden(output))

    handles = [model.model.layers[n].register_forward_hook(make(n)) for n in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing_layers(model: Any, changes: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output of each layer by `changes[layer](hidden [b, s, H])`."""

    def make(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            hidden = change(_hidden(output))
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return hook

    handles = [
        model.model.layers[n].register_forward_hook(make(change)) for n, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
