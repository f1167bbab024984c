"""An exported Hugging Face folder, opened for study."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from topk_megatron.errors import CheckpointError
from topk_megatron.hf.model import load_model, load_tokenizer

_NO_TOPK = {"site": "residual", "k": 0, "layers": [], "mode": "value"}


@dataclass
class Folder:
    """A model and its tokenizer, loaded when first used.

    Attributes:
        path: the folder.
        config: its config.json.
        training: its topk_training.json, empty if it has none.
        device: where the model runs.
    """

    path: Path
    config: dict[str, Any]
    training: dict[str, Any]
    device: torch.device

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.config["hidden_size"]

    @property
    def vocab_size(self) -> int:
        """Tokens of the model."""
        return self.config["vocab_size"]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config["num_hidden_layers"]

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return self.config.get("max_position_embeddings", 2048)

    @property
    def topk(self) -> dict[str, Any]:
        """The TopK settings of config.json."""
        return self.config.get("topk") or _NO_TOPK

    @property
    def topk_layers(self) -> tuple[int, ...]:
        """Layers with a TopK at the residual site; empty for a dense model."""
        return tuple(self.topk["layers"]) if self.topk["site"] != "mlp" else ()

    @property
    def iteration(self) -> int | None:
        """Training iteration of the export, None if the folder does not say."""
        return self.training.get("iteration")

    @cached_property
    def model(self) -> Any:
        """The causal language model, in eval mode, in the dtype that it was saved in."""
        return load_model(self.path, device=self.device).requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return load_tokenizer(self.path)

    def fingerprint(self) -> str:
        """SHA-256 of config.json and of the weights."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.path.glob("*.safetensors")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the model."""
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint(),
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "iteration": self.iteration,
            "tokens_seen": self.training.get("tokens_seen"),
        }


def open_folder(path: Path, device: torch.device | None = None) -> Folder:
    """Read a folder's settings; the model is loaded when it is first used.

    Raises:
        CheckpointError: no exported folder, or a configuration that lacks what is needed.
    """
    config = _json(path / "config.json")
    if config is None:
        raise CheckpointError(
            f"{path} holds no config.json; give a Hugging Face folder (tools/convert_checkpoint.py "
            "makes one of a checkpoint)"
        )
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        if not isinstance(config.get(name), int):
            raise CheckpointError(f"{path / 'config.json'} has no {name}; it is not supported")
    training = _json(path / "topk_training.json") or {}
    return Folder(path, config, training, device or default_device())


def default_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(content).__name__}")
    return content
