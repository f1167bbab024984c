"""Opens an exported folder, or any Hugging Face folder of a causal language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.hf.model import load_model, load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OpenModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        name: how it is called in tables: the end of its path.
        model: a transformers causal language model.
        tokenizer: its transformers tokenizer.
        context: tokens it was trained to read at once.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int

    @property
    def topk(self) -> dict[str, Any] | None:
        """Its TopK settings; None for a dense model."""
        settings = getattr(self.model.config, "topk", None)
        return settings if settings and settings["layers"] else None

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without anything added."""
        # verbose: a document may well be longer than the context; it is cut into windows.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def open_model(directory: Path, *, dtype: str = "float32", device: str = "cpu") -> OpenModel:
    """Load model and tokenizer from a folder; never looks for either on a hub.

    The folder's own modeling code is run, as it was named by the user: open only folders that you
    trust.

    Raises:
        CheckpointError: no folder, no model or no tokenizer in it, or parts that do not fit.
        ConfigError: a device or dtype that this machine does not have.
    """
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for and this machine has no CUDA; use cpu")
    model = load_model(directory, dtype=dtype, device=device)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {directory} has {len(tokenizer)} tokens, its model "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    name = "/".join(directory.resolve().parts[-2:])
    return OpenModel(name, model, tokenizer, model.config.max_position_embeddings)
