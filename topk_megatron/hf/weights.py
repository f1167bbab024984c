"""The weights of a Hugging Face folder, opened lazily and checked against the configuration."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topk_megatron.errors import CheckpointError
from topk_megatron.hf.shards import INDEX

_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class FolderWeights:
    """Tensors by name from ``model*.safetensors``; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Open every file.

        Raises:
            CheckpointError: no weights, or a shard that is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.directory = directory
        self._files: dict[str, Any] = {}
        named = self._index()
        for name in sorted(set(named.values())) if named else [_SINGLE]:
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{directory} is not whole: its file {name} is missing")
            try:
                file: Any = safe_open(path, framework="pt")  # pyright: ignore
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        lost = sorted(set(named) - set(self._files))
        if lost:
            raise CheckpointError(f"{directory}: its index names {lost[0]}, which no file holds")

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        return _DTYPES[self._files[name].get_slice(name).get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._files[name].get_tensor(name)

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.is_file():
            if not (self.directory / _SINGLE).is_file():
                raise CheckpointError(
                    f"{self.directory} has neither {_SINGLE} nor {INDEX}; it is not a Hugging Face "
                    "model with safetensors"
                )
            return {}
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not an index of safetensors: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, or not JSON.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
