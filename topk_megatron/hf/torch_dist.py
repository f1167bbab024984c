"""Reads Megatron's torch_dist checkpoints of any layout, slice by slice, without Megatron.

A checkpoint holds global tensors cut into chunks as the ranks had them; `CheckpointReader.read`
assembles one slice (a layer of a stacked tensor, an expert) from the chunks it overlaps, so that no
more than that slice and one chunk are in memory. Files are unpickled with an allow list: a
checkpoint from elsewhere cannot run code.
"""

import importlib
import io
import pickle
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
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

from topk_megatron.errors import CheckpointError

_COMMON = "common_state/shard_0_1"
_SAFE_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_SAFE_NAMES = {
    ("argparse", "Namespace"),
    ("builtins", "complex"),
    ("builtins", "frozenset"),
    ("builtins", "range"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("types", "SimpleNamespace"),
}
# torch's own pickles name layouts, memory formats and storages by these.
_SAFE_TORCH = ("torch", "torch.serialization", "torch._utils", "torch.storage")


class Opaque:
    """Stands for an object of a class that is not opened here, such as Megatron's enums."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Known plain classes; stand-ins for Megatron's; nothing else."""
        if module.split(".")[0] in ("megatron", "signal", "enum", "pathlib", "transformer_engine"):
            return type(name, (Opaque,), {"__module__": module})
        torch_plain = module in _SAFE_TORCH and (
            name in ("_get_layout", "device", "dtype", "UntypedStorage", "TypedStorage")
            or name.endswith("Storage")
            or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if (module, name) in _SAFE_NAMES or module in _SAFE_MODULES or torch_plain:
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


# What torch.load wants of a `pickle_module`.
_PICKLE: Any = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load(), __name__="pickle"
)


class CheckpointReader:
    """One iteration of a torch_dist checkpoint, opened.

    Attributes:
        directory: ``…/iter_0000100``.
        tensors: shape and dtype of each global tensor, by key.
        others: keys of objects that are not tensors.
        common: what Megatron saves once: arguments, iteration, schedule.
        args: the arguments of the run that wrote it.
    """

    def __init__(self, directory: Path) -> None:
        """Read the index and check that every file that it names is there and long enough.

        Raises:
            CheckpointError: not a checkpoint of this kind, or damaged.
        """
        self.directory = directory
        self._metadata = _read_metadata(directory)
        entries = self._metadata.state_dict_metadata
        self.tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self.others = [k for k, v in entries.items() if isinstance(v, BytesStorageMetadata)]
        self._check_files()
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.common = self._read_common()
        args = self.common.get("args")
        if not isinstance(args, Namespace):
            raise CheckpointError(
                f"{directory} has no arguments of a training run; it was not written by Megatron's "
                "training loop"
            )
        self.args = args

    def read(self, key: str, lead: tuple[int, ...] = ()) -> Tensor:
        """One slice of a tensor: index `lead` in its first dimensions, all of the others.

        Raises:
            CheckpointError: the slice cannot be read, or is not covered by the stored chunks.
        """
        stored = self.tensors[key]
        rest = stored.size[len(lead) :]
        offsets = torch.Size([*lead, *([0] * len(rest))])
        chunk = ChunkStorageMetadata(offsets, torch.Size([*([1] * len(lead)), *rest]))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        planner = _SlicePlanner(torch.empty(chunk.sizes, dtype=stored.properties.dtype))
        if sum(item.lengths.numel() for item in items) != chunk.sizes.numel():
            raise CheckpointError(
                f"{self.directory} lacks a part of {key}{list(lead) or ''}; it is damaged or was "
                "not written to its end"
            )
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

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            end = info.offset + info.length
            needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
        for name, length in sorted(needed.items()):
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(
                    f"{self.directory} is not whole: its file {name} is missing; copy it again, or "
                    "choose another --iteration"
                )
            if path.stat().st_size < length:
                raise CheckpointError(
                    f"{self.directory} is not whole: {name} has {path.stat().st_size} bytes of "
                    f"{length}; copy it again, or choose another --iteration"
                )

    def _read_common(self) -> dict[str, Any]:
        legacy = self.directory / "common.pt"
        try:
            if legacy.is_file():
                return _load(legacy)
            if _COMMON not in self.others:
                raise CheckpointError(f"{self.directory} holds neither common.pt nor {_COMMON}")
            planner = _SlicePlanner(torch.empty(0))
            none = torch.Size([0])
            index = MetadataIndex(_COMMON)
            item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
            self._run([item], planner, _COMMON)
            return _load(planner.content)[0]
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise self._damaged("its common state", error) from error


class _SlicePlanner(DefaultLoadPlanner):
    """Takes what the file system reader reads into one tensor, or one buffer of bytes."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.content = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that this chunk fills."""
        view = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the reader copied into the target itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Keep what is not a tensor."""
        self.content = value


def _load(source: Any) -> Any:
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def _read_metadata(directory: Path) -> Metadata:
    path = directory / ".metadata"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a torch_dist checkpoint: it has no .metadata")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise CheckpointError(f"{path} is not the index of a torch_dist checkpoint")
    return metadata
