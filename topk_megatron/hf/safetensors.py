"""Reads and writes safetensors files tensor by tensor, without holding a file's content in memory.

A file is the length of a JSON header (8 bytes), the header, and the tensors' bytes. A writer needs
all names, dtypes and shapes first, which the mapping knows before it reads a weight. Equal weights
give equal bytes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from topk_megatron.errors import CheckpointError
from topk_megatron.files import write_json

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsFile:
    """Reads tensors of one file with plain reads; a mapped file would count as memory in use."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: it is not a safetensors file, or it is cut off.
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
        """Return the shape of a tensor."""
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return _DTYPES[self.entries[name]["dtype"]]

    def read(self, name: str) -> Tensor:
        """Read a tensor."""
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
    """The tensors of a folder's ``model*.safetensors`` by name, read on demand."""

    def __init__(self, directory: Path) -> None:
        """Open every file.

        Raises:
            CheckpointError: there are no weights, or a file is missing or damaged.
        """
        self.directory = directory
        self._files: dict[str, SafetensorsFile] = {}
        named = self._index()
        for name in sorted(set(named.values())) if named else [_SINGLE]:
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{directory} is incomplete: its file {name} is missing")
            file = SafetensorsFile(path)
            self._files.update(dict.fromkeys(file.entries, file))
        lost = sorted(set(named) - set(self._files))
        if lost:
            raise CheckpointError(f"{directory}: its index names {lost[0]}, which no file holds")

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading the tensor."""
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading the tensor."""
        return self._files[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
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


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The tensor's size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: list[TensorPlan], shard_size: int) -> list[list[TensorPlan]]:
    """Fill files in order, up to `shard_size` bytes each; a larger tensor gets its own file."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


class ShardWriter:
    """Writes tensors in the planned order to ``model*.safetensors``, and the index.

    As a context manager it finishes when the block succeeds.
    """

    def __init__(
        self, directory: Path, shards: list[list[TensorPlan]], stem: str = "model"
    ) -> None:
        """Prepare to write.

        Args:
            directory: where the files go.
            shards: the tensors of each file, from `plan_shards`.
            stem: how the files' names begin.
        """
        self._directory = directory
        self._shards = shards
        self._stem = stem
        self._place = (0, 0)
        self._file: BinaryIO | None = None

    def file_name(self, shard: int) -> str:
        """Return Hugging Face's name of a file, counted from 0."""
        if len(self._shards) == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be the planned one."""
        shard, place = self._place
        planned = self._shards[shard][place]
        got = TensorPlan(name, tuple(tensor.shape), tensor.dtype)
        assert got == planned, (got, planned)
        if self._file is None:
            self._file = (self._directory / self.file_name(shard)).open("wb")
            self._file.write(_header(self._shards[shard]))
        flat = tensor.detach().contiguous().reshape(-1)
        self._file.write(memoryview(flat.view(torch.uint8).numpy()))
        if place + 1 == len(self._shards[shard]):
            _close(self._file)
            self._file = None
            self._place = (shard + 1, 0)
        else:
            self._place = (shard, place + 1)

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        assert self._place == (len(self._shards), 0), self._place
        if len(self._shards) == 1:
            return
        weight_map = {
            tensor.name: self.file_name(number)
            for number, shard in enumerate(self._shards)
            for tensor in shard
        }
        total = sum(tensor.num_bytes for shard in self._shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._directory / INDEX, index, sort_keys=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._file is not None:
            self._file.close()


def _header(tensors: list[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _close(file: BinaryIO) -> None:
    """Reach the disk before the folder gets its name, so that a power cut leaves no hollow file."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
