"""Which tokens a neuron promotes and suppresses: its direction through final norm and lm_head.

A residual stream that holds only neuron n, with a positive value, leaves the final norm as a
multiple of w_n e_n (RMSNorm) or of w * (e_n - 1/H) (LayerNorm), and raises the logits of the
output layer U [V, H] in proportion to U times that. This is the direct path only, without what
later layers make of the neuron. It is the same for every layer: all write the same basis.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topk_megatron.errors import AnalysisError


@dataclass(frozen=True)
class OutputDirections:
    """The final norm and output layer of a model.

    Attributes:
        head_VH: weight of the output layer.
        norm_H: weight of the final norm.
        centred: True for LayerNorm, which also subtracts the mean.
    """

    head_VH: Tensor
    norm_H: Tensor
    centred: bool

    def effects(self, start: int, stop: int) -> Tensor:
        """Return the effect of neurons [start, stop) on every logit, float32 [V, stop - start]."""
        weighted = self.head_VH.float() * self.norm_H.float()
        effects = weighted[:, start:stop]
        return effects - weighted.mean(dim=1, keepdim=True) if self.centred else effects

    def top(self, start: int, stop: int, number: int) -> tuple[list[list[tuple[int, float]]], ...]:
        """Return the most promoted and most suppressed tokens of each neuron, with effects."""
        effects = self.effects(start, stop)
        number = min(number, effects.shape[0])
        return tuple(
            _pairs(*effects.topk(number, dim=0, largest=largest)) for largest in (True, False)
        )


def _pairs(values: Tensor, tokens: Tensor) -> list[list[tuple[int, float]]]:
    """Turn [n, neurons] of each into a list of (token, value) for every neuron."""
    rows = zip(tokens.T.tolist(), values.T.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def directions_of(model: object, normalization: str) -> OutputDirections:
    """Return the directions of a loaded causal language model."""
    head = model.get_output_embeddings().weight.detach()  # pyright: ignore[reportAttributeAccessIssue]
    norm = model.model.norm.weight.detach()  # pyright: ignore[reportAttributeAccessIssue]
    return OutputDirections(head, norm, normalization == "LayerNorm")


def read_directions(path: Path, config: dict[str, object]) -> OutputDirections:
    """Read the directions of an exported folder: two tensors, and none of its code.

    Raises:
        AnalysisError: the folder or the tensors are not there, or damaged.
    """
    names = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
    found = _read_tensors(path, names)
    head = found.get("lm_head.weight", found.get("model.embed_tokens.weight"))
    norm = found.get("model.norm.weight")
    if head is None or norm is None:
        raise AnalysisError(
            f"{path} holds no final norm and output layer under the usual names; give a folder "
            "that tools/convert_checkpoint.py wrote"
        )
    return OutputDirections(head, norm, config.get("normalization") == "LayerNorm")


def _read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in set(names) & set(tensors.keys()):
                    found[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise AnalysisError(f"{file} is damaged: {error}") from error
    return found
