"""A Hugging Face folder, exported or not, opened for use: model, tokenizer and settings."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.files import read_object, sha256_of

# The folder's own modeling code runs, because the user named the folder; no hub is ever asked.
_OFFLINE: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
DTYPES = ("float32", "bfloat16", "float16")
TRAINING_FILE = "topk_training.json"
_NO_TOPK = {"site": "residual", "k": 0, "layers": [], "mode": "value"}


@dataclass
class OpenModel:
    """A causal language model and its tokenizer, both loaded on first use.

    Attributes:
        path: the folder.
        config: its config.json.
        training: its topk_training.json; empty if it has none.
        dtype: name of the torch dtype to load; "auto" keeps the dtype of the saved weights.
        device: where the model runs.
    """

    path: Path
    config: dict[str, Any]
    training: dict[str, Any]
    dtype: str
    device: Any

    @property
    def name(self) -> str:
        """The model's name in tables: the last two parts of its path."""
        return "/".join(self.path.resolve().parts[-2:])

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._size("hidden_size")

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model embeds."""
        return self._size("vocab_size")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self._size("num_hidden_layers")

    @property
    def max_length(self) -> int:
        """The longest input that the model was built for, in tokens."""
        length = self.config.get("max_position_embeddings")
        return length or getattr(self.model.config, "max_position_embeddings", 2048)

    @property
    def topk(self) -> dict[str, Any]:
        """The TopK settings of config.json; a dense model has no layers in them."""
        return self.config.get("topk") or _NO_TOPK

    @property
    def is_topk(self) -> bool:
        """Whether any layer has a TopK, at whichever site."""
        return bool(self.topk["layers"])

    @property
    def topk_layers(self) -> tuple[int, ...]:
        """Layers with a TopK at the residual site; empty for a dense model."""
        return tuple(self.topk["layers"]) if self.topk["site"] != "mlp" else ()

    @property
    def iteration(self) -> int | None:
        """Training iteration of the export; None if the folder does not record it."""
        return self.training.get("iteration")

    @cached_property
    def model(self) -> Any:
        """The causal language model, in evaluation mode and without gradients."""
        loaded = load_model(self.path, dtype=self.dtype, device=self.device)
        return loaded.requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer.

        Raises:
            CheckpointError: it is missing, broken, or has tokens that the model does not embed.
        """
        tokenizer = load_tokenizer(self.path)
        if len(tokenizer) > self.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.path} has {len(tokenizer)} tokens, its model "
                f"{self.vocab_size}; put the tokenizer there that the model was trained with"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        # A document may be longer than the context, because it is cut into windows: no warning.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def fingerprint(self) -> str:
        """Return the SHA-256 of config.json and the weights."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.path.glob("*.safetensors")):
            digest.update(bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a study's manifest records about the model."""
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint(),
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "iteration": self.iteration,
            "tokens_seen": self.training.get("tokens_seen"),
        }

    def _size(self, name: str) -> int:
        size = self.config.get(name)
        if not isinstance(size, int):
            raise CheckpointError(f"{self.path / 'config.json'} has no {name}; it is not supported")
        return size


def open_model(path: Path, *, dtype: str = "auto", device: Any = None) -> OpenModel:
    """Read a folder's settings; the model and the tokenizer are loaded on first use.

    The folder's own modeling code runs then: open only folders that you trust.

    Args:
        path: the folder.
        dtype: one of `DTYPES`, or "auto" for the dtype of the saved weights.
        device: None is this rank's GPU, or the CPU where there is none.

    Raises:
        CheckpointError: the folder is missing, or its settings cannot be read.
        ConfigError: a dtype or device that this machine does not have.
    """
    config = _read_config(path)
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    training = path / TRAINING_FILE
    record = read_object(training) if training.is_file() else {}
    return OpenModel(path, config, record, dtype, _device(device))


def load_model(folder: Path, *, dtype: str = "auto", device: Any = "cpu") -> Any:
    """Load a causal language model in evaluation mode.

    Args:
        folder: config.json, weights and, for an exported model, its modeling code.
        dtype: name of a torch dtype; "auto" keeps the dtype of the saved weights.
        device: where to put the model.

    Raises:
        CheckpointError: there is no model, or its weights do not fit its configuration.
    """
    from transformers import AutoModelForCausalLM

    _read_config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, **_OFFLINE
        )
    except Exception as error:  # transformers raises a dozen kinds for a broken folder
        raise CheckpointError(f"cannot load the model in {folder}: {_first_line(error)}") from error
    model, report = loaded
    wrong = {name: report[name] for name in ("missing_keys", "unexpected_keys") if report[name]}
    if wrong:
        names = "; ".join(f"{kind[:-5]}: {', '.join(sorted(v)[:3])}" for kind, v in wrong.items())
        raise CheckpointError(f"the weights of {folder} do not fit its config.json: {names}")
    return model.eval().to(device)


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer.

    Raises:
        CheckpointError: the tokenizer is missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), **_OFFLINE)
    except Exception as error:
        raise CheckpointError(
            f"cannot load the tokenizer in {folder}: {_first_line(error)}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json; give a Hugging Face folder ("
            "tools/convert_checkpoint.py to-hf makes one from a checkpoint)"
        )
    return read_object(folder / "config.json")


def _device(wanted: Any) -> Any:
    import torch

    has_cuda = torch.cuda.is_available()
    if wanted is None and has_cuda:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if wanted is None:
        return torch.device("cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not has_cuda:
        raise ConfigError(f"device {wanted} was asked for and this machine has no CUDA; use cpu")
    return device


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
