"""Presents a TopK layer to SAELens as a sparse autoencoder that changes nothing.

The hidden state of a TopK layer is its own sparse code, so that encoder and decoder are the
identity. Every tool that takes a SAELens SAE takes a TopK layer in this form. (SAELens's own TopK
applies a ReLU after selecting, which would lose negative survivors.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor

ARCHITECTURE = "topk_lm_identity"


@dataclass
class IdentitySAEConfig(SAEConfig):
    """The configuration of an SAE whose input and code both have the hidden size."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name under which SAELens finds it."""
        return ARCHITECTURE


class IdentitySAE(SAE[IdentitySAEConfig]):
    """An SAE with z = x, bitwise: its weights are identity matrices that are never multiplied."""

    def __init__(self, cfg: IdentitySAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        for weight in self.parameters():
            weight.requires_grad_(False)

    def initialize_weights(self) -> None:
        """Set both matrices to the identity, so that a decoder direction is a neuron."""
        super().initialize_weights()
        with torch.no_grad():
            self.W_enc.copy_(torch.eye(self.cfg.d_in))
            self.W_dec.copy_(torch.eye(self.cfg.d_in))
            self.b_dec.zero_()

    def encode(self, x: Tensor) -> Tensor:
        """Return x [..., H], which is its own code."""
        return self.hook_sae_acts_post(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the code [..., H], which is the hidden state."""
        return self.hook_sae_recons(feature_acts)


def identity_sae(*, hidden_size: int, hook_name: str, **metadata: Any) -> IdentitySAE:
    """Return an SAE for the layer at `hook_name`.

    Args:
        hidden_size: H of the model.
        hook_name: where SAELens and TransformerLens find the states, such as
            ``blocks.3.hook_out`` of a TransformerBridge.
        metadata: further fields of SAELens's metadata, such as ``model_name``.
    """
    cfg = IdentitySAEConfig(
        d_in=hidden_size,
        d_sae=hidden_size,
        apply_b_dec_to_input=False,
        normalize_activations="none",
        metadata=SAEMetadata(hook_name=hook_name, **metadata),
    )
    return IdentitySAE(cfg)


register_sae_class(ARCHITECTURE, IdentitySAE, IdentitySAEConfig)
