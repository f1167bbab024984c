"""Writes torch_dist checkpoints that Megatron loads in any layout, one tensor at a time."""

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from topk_megatron.checkpoint.reader import COMMON_KEY
from topk_megatron.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """A part of a global tensor, and how to load it.

    Attributes:
        key: key of the global tensor.
        size: shape of the global tensor.
        lead: indices of the part in the first dimensions; the part has all of the others.
        dtype: dtype of the tensor.
        load: returns the part, without the leading dimensions.
    """

    key: str
    size: tuple[int, ...]
    lead: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def offsets(self) -> torch.Size:
        """Where the part begins in the global tensor."""
        return torch.Size([*self.lead, *([0] * (len(self.size) - len(self.lead)))])

    @property
    def sizes(self) -> torch.Size:
        """The shape of the part, with leading dimensions of 1."""
        return torch.Size([*([1] * len(self.lead)), *self.size[len(self.lead) :]])


def write_torch_dist(
    directory: Path, chunks: list[Chunk], common: dict[str, Any], empty_objects: list[str]
) -> None:
    """Write one iteration, ``metadata.json`` last, which makes it complete.

    Args:
        directory: ``…/iter_0000100``, which must not exist.
        chunks: the weights.
        common: the object that Megatron saves once: arguments, iteration.
        empty_objects: keys of objects that Megatron expects and that hold nothing.
    """
    directory.mkdir(parents=True)
    objects = {COMMON_KEY: common, **dict.fromkeys(empty_objects)}
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    with warnings.catch_warnings():
        # One process is intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            planner = _Planner(chunks, objects)
            save_distributed({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise _reason(error) from error
    settings = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(settings))


def _reason(error: CheckpointException) -> BaseException:
    """Return the root cause: a user's mistake or an error of the operating system."""
    found: BaseException | None = next(iter(error.failures.values()))[0]
    last = found
    while found is not None:
        if isinstance(found, UserError | OSError):
            return found
        last, found = found, found.__cause__ or found.__context__
    return last or error


class _Planner(DefaultSavePlanner):
    """Lists the chunks, and loads each one only when it is written."""

    def __init__(self, chunks: list[Chunk], objects: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        assert len(self._chunks) == len(chunks)
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        """Plan all chunks and objects, in order."""
        items = [_write_item(chunk) for chunk in self._chunks.values()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return a chunk's tensor, or an object pickled as Megatron does it."""
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([self._objects[key]], content)
            return content
        assert write_item.index.offset is not None
        chunk = self._chunks[key, write_item.index.offset]
        tensor = chunk.load().to(chunk.dtype).contiguous()
        return tensor.reshape(chunk.sizes)


def _write_item(chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(chunk.offsets, chunk.sizes),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size(chunk.size),
        ),
    )
