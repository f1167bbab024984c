"""Reads Megatron's torch_dist checkpoints of any layout, slice by slice, without Megatron.

Of a checkpoint of Megatron-FSDP (``--ckpt-format fsdp_dtensor``) it reads the arguments and checks
the objects, which is what resuming needs; its tensors have other names and are cut differently.

A checkpoint holds global tensors in chunks, as the ranks had them. `CheckpointReader.read` builds
one slice (a layer of a stacked tensor, an expert) from the chunks that it overlaps, so that only
that slice and one chunk are in memory. Every pickle is opened by
`topk_megatron.checkpoint.pickles`: a checkpoint from elsewhere cannot run code.
"""

import io
import pickle
from argparse import Namespace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from topk_megatron.checkpoint.pickles import check_object, read_index, read_object
from topk_megatron.errors import CheckpointError, DamagedCheckpointError, UnsafeCheckpointError

# The object that Megatron saves once: arguments, iteration, schedule.
COMMON_KEY = "common_state/shard_0_1"
_LEGACY_COMMON = "common.pt"
# Megatron-FSDP saves each entry of that object by itself.
_FSDP_ARGS = "args"


class CheckpointReader:
    """One iteration of a torch_dist checkpoint, open for reading.

    Attributes:
        directory: ``…/iter_0000100``.
        tensors: shape and dtype of each global tensor, by key.
        others: keys of objects that are not tensors.
    """

    def __init__(self, directory: Path, *, hashes: bool = False) -> None:
        """Read the index, and check that every file in it exists and is long enough.

        Args:
            directory: the directory of one iteration.
            hashes: whether to compare every file with its recorded SHA-256, if there is one.

        Raises:
            CheckpointError: it is not a checkpoint of this kind.
            DamagedCheckpointError: it lacks something, or cannot be read.
            UnsafeCheckpointError: its index would run code, which is not damage to step around.
        """
        self.directory = directory
        self._metadata = _read_index_of(directory)
        if damage := _missing_bytes(directory, self._metadata):
            raise DamagedCheckpointError(directory, damage)
        if hashes and (damage := _changed_file(directory)):
            raise DamagedCheckpointError(directory, damage)
        entries = self._metadata.state_dict_metadata
        self.tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self.others = [k for k, v in entries.items() if isinstance(v, BytesStorageMetadata)]
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def is_fsdp(self) -> bool:
        """Whether Megatron-FSDP wrote the checkpoint."""
        return _names_fsdp(self._metadata)

    @cached_property
    def args(self) -> Namespace:
        """The arguments of the run that wrote the checkpoint."""
        args = self.common.get("args")
        if not isinstance(args, Namespace):
            raise CheckpointError(
                f"{self.directory} has no arguments of a training run; it was not written by "
                "Megatron's training loop"
            )
        return args

    def read(self, key: str, lead: tuple[int, ...] = ()) -> Tensor:
        """Read one slice of a tensor: index `lead` in its first dimensions, all of the others.

        Raises:
            CheckpointError: the slice cannot be read, or the stored chunks do not cover it.
        """
        stored = self.tensors[key]
        rest = stored.size[len(lead) :]
        offsets = torch.Size([*lead, *([0] * len(rest))])
        chunk = ChunkStorageMetadata(offsets, torch.Size([*([1] * len(lead)), *rest]))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != chunk.sizes.numel():
            raise CheckpointError(
                f"{self.directory} lacks a part of {key}{list(lead) or ''}; it is damaged or its "
                "writing was interrupted"
            )
        planner = _SlicePlanner(torch.empty(chunk.sizes, dtype=stored.properties.dtype))
        self._run(items, planner, key)
        return planner.target.reshape(rest)

    def _run(self, items: list[ReadItem], planner: "_SlicePlanner", key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (OSError, EOFError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            raise self._damaged(key, error) from error
        except pickle.UnpicklingError as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:200]
        return CheckpointError(
            f"{self.directory}: {key} cannot be read, a file is damaged: {reason}"
        )

    @cached_property
    def common(self) -> dict[str, Any]:
        """The object that Megatron saves once: arguments, iteration, schedule."""
        legacy = self.directory / _LEGACY_COMMON
        try:
            if legacy.is_file():
                common = read_object(legacy.read_bytes(), str(legacy))
            elif COMMON_KEY in self.others:
                source = f"{self.directory}: {COMMON_KEY}"
                (common,) = read_object(self.read_bytes(COMMON_KEY), source)
            elif self.is_fsdp:
                source = f"{self.directory}: {_FSDP_ARGS}"
                common = {_FSDP_ARGS: read_object(self.read_bytes(_FSDP_ARGS), source)}
            else:
                raise CheckpointError(
                    f"{self.directory} holds neither {_LEGACY_COMMON} nor {COMMON_KEY}"
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._damaged("its common state", error) from error
        if not isinstance(common, dict):
            raise CheckpointError(f"{self.directory}: its common state is not a dictionary")
        return common

    def read_bytes(self, key: str) -> bytes:
        """Return the bytes of an object that is not a tensor, without opening it."""
        planner = _SlicePlanner(torch.empty(0))
        none = torch.Size([0])
        index = MetadataIndex(key)
        self._run([ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)], planner, key)
        return planner.content.getvalue()

    def check_objects(self) -> None:
        """Refuse a checkpoint whose objects Megatron's own loader must not unpickle.

        Raises:
            UnsafeCheckpointError: an object names something that no checkpoint holds.
            CheckpointError: an object is damaged.
        """
        for key in self.others:
            try:
                check_object(self.read_bytes(key), f"{self.directory}: {key}")
            except (RuntimeError, ValueError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise self._damaged(key, error) from error


class _SlicePlanner(DefaultLoadPlanner):
    """Takes what the file system reader reads into one tensor, or one buffer of bytes."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.content = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the target that this chunk fills."""
        view = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the reader copied into the target itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Keep the bytes of an object that is not a tensor."""
        self.content = value


def _read_index_of(directory: Path) -> Metadata:
    path = directory / ".metadata"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a torch_dist checkpoint: it has no .metadata")
    try:
        return read_index(path)
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpointError(directory, f".metadata cannot be read ({reason})") from error


def is_fsdp_index(directory: Path) -> bool:
    """Return whether a directory's index is one that Megatron-FSDP wrote, and can be read.

    Raises:
        UnsafeCheckpointError: the index would run code.
    """
    try:
        return _names_fsdp(_read_index_of(directory))
    except DamagedCheckpointError:
        return False


def _names_fsdp(index: Metadata) -> bool:
    # torch_dist keeps the arguments inside the common state, or in a file of their own.
    return _FSDP_ARGS in index.state_dict_metadata


def _missing_bytes(directory: Path, index: Metadata) -> str | None:
    """Describe the first file that is missing or shorter than the index says, or return None.

    Raises:
        UnsafeCheckpointError: the index names a file outside the checkpoint.
    """
    needed: dict[str, int] = {}
    for info in index.storage_data.values():
        end = info.offset + info.length
        needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
    for name, length in sorted(needed.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UnsafeCheckpointError(f"{directory}/.metadata names a file elsewhere: {name}")
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < length:
            return f"{name} has {path.stat().st_size} bytes of {length}"
    return None


def _changed_file(directory: Path) -> str | None:
    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if not (directory / validation.INTEGRITY_FNAME).exists():
        return None
    try:
        validation._verify_integrity_manifest_impl(str(directory))
    except CheckpointingException as error:
        return " ".join(str(error).splitlines()[-1].split())
    return None
