"""The baseline: TopK SAEs trained by SAELens' own trainer on a dense model's hidden states.

Trained SAEs are kept as SAELens saves them, one directory per layer and seed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.analysis.corpus import Corpus
from topk_megatron.analysis.sources import changing_layers, reading_layers
from topk_megatron.errors import CheckpointError
from topk_megatron.hf.model import OpenModel

_LOGGED_STEPS = 50
# Batches from which the mean norm of the hidden states is estimated before training.
_NORM_BATCHES = 8
# Sequences on which the model's loss is measured with and without the reconstruction.
_LOSS_SEQUENCES = 32
_NAME = re.compile(r"layer-(\d+)-seed-(\d+)")


@dataclass(frozen=True, kw_only=True)
class SAETraining:
    """How an SAE is trained.

    Attributes:
        width: latents.
        k: latents that survive per token.
        tokens: hidden states seen in training; the corpus is repeated as needed.
        batch: hidden states per step.
        lr: learning rate of Adam, which decays linearly to 0 over the last fifth.
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
    """Return the outputs of layers on the first `tokens` tokens, float32 [tokens, H] each."""
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
        SAELens' TopKTrainingSAE, and the rows of sae/training.parquet without layer and seed.
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
        lr_end=training.lr / 10,  # SAELens wants it, though only its other schedules use it.
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
    """Return a subclass of SAELens' trainer that appends to `rows`; imports the library late."""
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
    """Measure how well an SAE rebuilds hidden states [tokens, H] that it was not trained on."""
    latents = sae.encode(states)
    rebuilt = sae.decode(latents)
    spread = (states - states.mean(dim=0)).pow(2).sum()
    sequences = min(len(corpus.tokens) // seq_length, _LOSS_SEQUENCES)
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


def sae_directory(study: Path, layer: int, seed: int) -> Path:
    """Return the directory of the SAE of a layer and seed in a study."""
    return study / "sae" / f"layer-{layer:03d}-seed-{seed}"


def load_saes(directories: Sequence[Path]) -> tuple[dict[int, Any], dict[str, Any]]:
    """Load SAEs of several layers, all of one seed.

    Returns:
        The SAEs by layer, and the manifest's entry about them.

    Raises:
        CheckpointError: SAELens is not installed, or a directory holds no SAE, names no layer, or
            repeats one.
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise CheckpointError("SAEs need the package sae-lens, which is not installed") from error
    saes: dict[int, Any] = {}
    seeds: set[int] = set()
    for directory in directories:
        match = _NAME.fullmatch(directory.name)
        if match is None:
            raise CheckpointError(
                f"{directory} does not say which layer it is for; SAE directories are called "
                "layer-LLL-seed-S"
            )
        if int(match[1]) in saes:
            raise CheckpointError(f"two SAEs for layer {int(match[1])} were given; give one")
        try:
            saes[int(match[1])] = SAE.load_from_disk(str(directory), device="cpu").eval()
        except Exception as error:  # SAELens raises errors of many kinds.
            raise CheckpointError(f"cannot load the SAE in {directory}: {error!r}") from error
        seeds.add(int(match[2]))
    if len(seeds) > 1:
        raise CheckpointError(f"the SAEs are of seeds {sorted(seeds)}; give those of one seed")
    return saes, {"path": str(directories[0].parent), "layers": sorted(saes), "seed": seeds.pop()}
