"""Opens the model and the tokenizer of a Hugging Face folder, exported or not."""

from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError

# The folder's own modeling code is run, for it was named by the user; a hub is never asked.
_OFFLINE: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}


def load_model(folder: Path, *, dtype: str = "auto", device: Any = "cpu") -> Any:
    """Load a causal language model in evaluation mode.

    Args:
        folder: config.json, weights and, for an exported model, its modeling code.
        dtype: name of a torch dtype; "auto" is the one that the weights were saved in.
        device: where to put it.

    Raises:
        CheckpointError: no model there, or weights that do not fit its configuration.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no Hugging Face model (no config.json); make one with "
            "tools/convert_checkpoint.py to-hf"
        )
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
        CheckpointError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), **_OFFLINE)
    except Exception as error:
        raise CheckpointError(
            f"cannot load the tokenizer in {folder}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
