"""Writes safetensors files tensor by tensor, without holding a file's content in memory.

The format (8 bytes of header length, a JSON header, the tensors' bytes) needs all names, dtypes and
shapes first, which the mapping knows before a weight is read. One tensor is in memory at a time,
and equal weights give equal bytes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: list[TensorPlan], shard_size: int) -> list[list[TensorPlan]]:
    """Fill files in order up to `shard_size` bytes; a larger tensor gets a file of its own."""
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
    """Takes tensors in the planned order and writes ``model*.safetensors`` and the index."""

    def __init__(
        self, directory: Path, shards: list[list[TensorPlan]], stem: str = "model"
    ) -> None:
        """Args: directory: where to. shards: what `plan_shards` gave. stem: of the file names."""
        self._directory = directory
        self._shards = shards
        self._stem = stem
        self._place = (0, 0)
        self._file: BinaryIO | None = None

    def file_name(self, shard: int) -> str:
        """Hugging Face's name of a shard, counted from 0."""
        if len(self._shards) == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; it must be the one that was planned."""
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
        (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def abort(self) -> None:
        """Let go of the open file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _header(tensors: list[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on 8 bytes
    return len(text).to_bytes(8, "little") + text


def _close(file: BinaryIO) -> None:
    """On the disk before the folder gets its name, so that a power cut leaves no hollow file."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
