"""Trains the baseline: a TopK SAE, by SAELens' own trainer, on a dense model's hidden states."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topk_megatron.analysis.corpus import Corpus
from topk_megatron.analysis.hooks import changing_layers, reading_layers
from topk_megatron.hf.model import OpenModel

_LOGGED_STEPS = 50
# Batches of which the mean norm of the hidden states is taken, before training.
_NORM_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class SAETraining:
    """How a SAE is trained.

    Attributes:
        width, k: latents, and those that survive.
        tokens: hidden states seen in training; the corpus is repeated as needed.
        batch: hidden states of a step.
        lr: of Adam, decaying linearly to 0 over the last fifth.
    """

    width: int
    k: int
    tokens: int
    batch: int = 1024
    lr: float = 1e-3


@torch.inference_mode()
def hidden_states(
    folder: OpenModel, corpus: Corpus, layers: tuple[int, ...], tokens: int, seq_length: int
) -> dict[int, Tensor]:
    """Outputs of layers on the first so many tokens, float32 [tokens, H] each, in memory."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    whole = min(tokens, len(corpus.tokens)) // seq_length * seq_length
    sequences = torch.from_numpy(corpus.sequences(0, whole, seq_length)).view(-1, seq_length)

    def read(layer: int, hidden: Tensor) -> None:
        parts[layer].append(hidden.flatten(0, 1).float().cpu())

    with reading_layers(folder.model, layers, read):
        for batch in sequences.split(16):
            folder.model.model(batch.to(folder.device), use_cache=False)
    return {layer: torch.cat(found) for layer, found in parts.items()}


def train_sae(states: Tensor, training: SAETraining, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Train one SAE on hidden states [tokens, H].

    Returns:
        SAELens' TopKTrainingSAE, and rows of sae/training.parquet without layer and seed.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            k=training.k,
            d_in=states.shape[1],
            d_sae=training.width,
            device="cpu",
            normalize_activations="expected_average_only_in",
        )
    )
    steps = -(-training.tokens // training.batch)
    config = SAETrainerConfig(
        total_training_samples=steps * training.batch,
        train_batch_size_samples=training.batch,
        lr=training.lr,
        lr_end=training.lr / 10,  # asked for, and used by other schedules only
        lr_decay_steps=steps // 5,
        n_batches_for_norm_estimate=_NORM_BATCHES,
        dead_feature_window=max(10, steps // 10),
    )
    variance = float((states - states.mean(dim=0)).pow(2).sum(dim=1).mean())
    rows: list[dict[str, Any]] = []
    trainer = _logging_trainer(rows, variance, steps)
    batches = _batches(states, training.batch, seed)
    return trainer(config, sae, batches).fit().eval(), rows


def _logging_trainer(rows: list[dict[str, Any]], variance: float, steps: int) -> Any:
    """SAELens' trainer, which also appends to `rows`; the library is imported only here."""
    from sae_lens.training.sae_trainer import SAETrainer

    class Logging(SAETrainer):
        def step(self, batch: Tensor) -> Any:
            output = super().step(batch)
            number = self.n_training_steps
            if number % _LOGGED_STEPS == 0 or number == steps - 1:
                scale = self.activation_scaler.scaling_factor or 1.0
                error = (output.sae_out - output.sae_in).detach().pow(2).sum(dim=-1).mean()
                mse = float(error) / scale**2
                rows.append(
                    {
                        "step": number,
                        "tokens": self.n_training_samples,
                        "mse": mse,
                        "explained_variance": 1 - mse / variance,
                        "dead": int(self.dead_neurons.sum()),
                    }
                )
            return output

    return Logging


def _batches(states: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(states), generator=generator)
        size = min(size, len(states))
        for part in order[: len(order) // size * size].split(size):
            yield states[part]


@torch.inference_mode()
def quality(
    folder: OpenModel, sae: Any, layer: int, states: Tensor, corpus: Corpus, seq_length: int
) -> dict[str, Any]:
    """How well a SAE rebuilds hidden states that it was not trained on [tokens, H]."""
    latents = sae.encode(states)
    rebuilt = sae.decode(latents)
    spread = (states - states.mean(dim=0)).pow(2).sum()
    sequences = min(len(corpus.tokens) // seq_length, 32)
    tokens = torch.from_numpy(corpus.sequences(0, sequences * seq_length, seq_length))
    tokens = tokens.view(-1, seq_length).to(folder.device)
    without = folder.model(tokens, labels=tokens, use_cache=False).loss
    sae = sae.to(folder.device)
    with changing_layers(folder.model, {layer: lambda h: sae.decode(sae.encode(h)).to(h.dtype)}):
        inside = folder.model(tokens, labels=tokens, use_cache=False).loss
    return {
        "explained_variance": float(1 - (states - rebuilt).pow(2).sum() / spread),
        "l0": float((latents != 0).sum(dim=1).double().mean()),
        "dead_share": float((latents != 0).any(dim=0).logical_not().double().mean()),
        "loss": float(inside),
        "loss_without": float(without),
    }
