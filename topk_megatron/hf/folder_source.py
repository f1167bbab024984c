"""Reads a Hugging Face folder for conversion: configuration, weights, Megatron's arguments."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from topk_megatron.config import TopKConfig, exported_settings
from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.files import read_object
from topk_megatron.hf.export import FORMAT_VERSION, check_config
from topk_megatron.hf.families import dense_config
from topk_megatron.hf.flag_mapping import read_config, write_args
from topk_megatron.hf.model import TRAINING_FILE
from topk_megatron.hf.safetensors import FolderWeights
from topk_megatron.hf.tokenizer_export import HUGGING_FACE

_EMBEDDING = "model.embed_tokens.weight"
_PARTS = ("format_version", "iteration", "topk", "tokenizer_type", "megatron_args")


class HuggingFaceSource:
    """The folder of an exported TopK LM, or of a dense Llama, Qwen2 or Qwen3.

    Attributes:
        directory: the folder.
        config: as `topk_megatron.hf.megatron_source.MegatronSource.config` has it.
        weights: its tensors, read on demand.
        args: Megatron's arguments that describe the model and its training.
        iteration: steps taken; 0 for a model that Megatron has not trained.
        is_export: whether this project exported it.
    """

    def __init__(self, directory: Path) -> None:
        """Open and check a folder.

        Raises:
            CheckpointError: it is not such a folder, or its parts contradict each other.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a folder")
        self.directory = directory
        theirs = read_object(directory / "config.json")
        self.weights = FolderWeights(directory)
        self.is_export = theirs.get("model_type") == "topk_lm"
        if self.is_export:
            self._read_export(theirs)
        else:
            self._read_dense(theirs)

    def _read_export(self, theirs: dict[str, Any]) -> None:
        check_config(theirs)
        training = read_object(self.directory / TRAINING_FILE)
        missing = [name for name in _PARTS if name not in training]
        if missing or training["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.directory / TRAINING_FILE} must have format version {FORMAT_VERSION} and "
                f"{', '.join(_PARTS)}; export the checkpoint again"
            )
        self.iteration = int(training["iteration"])
        self.args = Namespace(**{k: _restore(v) for k, v in training["megatron_args"].items()})
        settings = training["topk"]
        try:
            topk = None if settings is None else TopKConfig.from_dict(settings)
        except (ConfigError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.directory / TRAINING_FILE}: {error}") from error
        self.args.topk = settings
        self.config = read_config(self.args)
        self.config["topk"] = exported_settings(topk, self.iteration)
        for name, value in self.config.items():
            if theirs.get(name) != value:
                raise CheckpointError(
                    f"{self.directory}: config.json has {name}={theirs.get(name)!r} where "
                    f"{TRAINING_FILE} says {value!r}; one of them was edited"
                )
        self.config["vocab_size"] = int(theirs["vocab_size"])

    def _read_dense(self, theirs: dict[str, Any]) -> None:
        self.config = dense_config(theirs)
        self.iteration = 0
        hidden, layers = self.config["hidden_size"], self.config["num_hidden_layers"]
        dense = TopKConfig(hidden_size=hidden, num_layers=layers, k=hidden, layers=())
        self.config["topk"] = exported_settings(dense, 0)
        if _EMBEDDING not in self.weights.names:
            raise CheckpointError(f"{self.directory} has no {_EMBEDDING}")
        dtype = self.weights.dtype(_EMBEDDING)
        self.args = Namespace(
            **write_args(self.config),
            **UNTRAINED,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            seq_length=self.config["max_position_embeddings"],
            tokenizer_type=HUGGING_FACE,
            topk=dense.to_dict(),
        )


# What Megatron asks about a run that has not started.
UNTRAINED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 128,
    "skipped_train_samples": 0,
    "transformer_impl": "local",
}


def _restore(value: Any) -> Any:
    """Return a recorded argument; dtypes are text in JSON."""
    if isinstance(value, str) and value.startswith("torch."):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return value
