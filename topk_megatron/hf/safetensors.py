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


class SafetensorsFile:
    """Reads tensors of one file with plain reads: a mapped file would count as memory in use."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: not a safetensors file, or one that was cut off.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if not 0 < length <= size - 8:
                    raise CheckpointError(f"{path} is damaged: it ends before its header does")
                header = json.loads(file.read(length))
            self._start = 8 + length
            self.entries = {name: e for name, e in header.items() if name != "__metadata__"}
            end = self._start + max(e["data_offsets"][1] for e in self.entries.values())
            unknown = {e["dtype"] for e in self.entries.values()} - set(_DTYPES)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged: its header cannot be read") from error
        if size != end:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes of {end}")
        if unknown:
            raise CheckpointError(f"{path} holds {unknown.pop()} tensors, which are not converted")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return _DTYPES[self.entries[name]["dtype"]]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        begin, end = self.entries[name]["data_offsets"]
        content = bytearray(end - begin)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            view, done = memoryview(content), 0
            while done < len(content):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} is damaged: {name} is cut off")
                done += count
        if not content:
            return torch.empty(self.shape(name), dtype=self.dtype(name))
        return torch.frombuffer(content, dtype=self.dtype(name)).reshape(self.shape(name))


class FolderWeights:
    """Tensors by name from ``model*.safetensors``; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Open every file.

        Raises:
            CheckpointError: no weights, or a shard that is missing or damaged.
        """
        self.directory = directory
        self._files: dict[str, SafetensorsFile] = {}
        named = self._index()
        for name in sorted(set(named.values())) if named else [_SINGLE]:
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{directory} is not whole: its file {name} is missing")
            file = SafetensorsFile(path)
            self._files.update(dict.fromkeys(file.entries, file))
        lost = sorted(set(named) - set(self._files))
        if lost:
            raise CheckpointError(f"{directory}: its index names {lost[0]}, which no file holds")

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        return self._files[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._files[name].read(name)

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
