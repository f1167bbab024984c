"""Opens an exported folder, or any Hugging Face folder of a causal language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError, ConfigError

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
        CheckpointError: no folder, no model or no tokenizer in it, or weights that do not fit.
        ConfigError: a device or dtype that this machine does not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds no Hugging Face model (no config.json); make one with "
            "tools/convert_checkpoint.py to-hf"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for and this machine has no CUDA; use cpu")
    offline: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(directory, **offline)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), output_loading_info=True, **offline
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(directory, **offline)
    except Exception as error:  # transformers raises a dozen kinds for a broken folder
        raise CheckpointError(f"{directory} cannot be opened: {_first_line(error)}") from error
    wrong = {name: report[name] for name in ("missing_keys", "unexpected_keys") if report[name]}
    if wrong:
        names = "; ".join(f"{kind[:-5]}: {', '.join(sorted(v)[:3])}" for kind, v in wrong.items())
        raise CheckpointError(f"the weights of {directory} do not fit its config.json: {names}")
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {directory} has {len(tokenizer)} tokens, its model "
            f"{config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    name = "/".join(directory.resolve().parts[-2:])
    return OpenModel(name, model.eval().to(device), tokenizer, config.max_position_embeddings)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
