"""Opens the pickles of a checkpoint without running code from them.

A torch_dist checkpoint holds pickles in two places: its index, ``.metadata``, and the objects that
are not tensors (arguments, generator states). Unpickling calls whatever a pickle names, so that a
checkpoint from elsewhere could run any code. Three rules prevent that:

- the index is read with an explicit list of the classes that torch writes into it. Each class is
  sealed: a pickle can create instances, but cannot change the class;
- objects are read by torch's own restricted unpickler (``weights_only``). A class of Megatron that
  this process has not imported is not looked up; a `StandIn` takes its place;
- Megatron's loader unpickles freely. Before it opens a checkpoint, `check_object` compares every
  name in every object with an explicit list.

No list names a whole module: modules hold functions too, and one such function is enough.
"""

import functools
import io
import pickle
import pickletools
from argparse import Namespace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from topk_megatron.errors import UnsafeCheckpointError

# The classes that torch (2.10 to 2.14) pickles into an index.
_INDEX_CLASSES: tuple[Any, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
    filesystem._StorageInfo,
    *([planner.BytesIOWriteData] if hasattr(planner, "BytesIOWriteData") else []),
)
_PLAIN = {"argparse.Namespace": Namespace, "types.SimpleNamespace": SimpleNamespace}
# Packages whose classes a checkpoint's arguments may hold (enums, holders of dtypes, paths).
_STOOD_IN = ("megatron", "signal", "enum", "pathlib", "transformer_engine")
# The names that Megatron 0.19 and Transformer Engine put into a checkpoint's objects, in addition
# to torch's own tensors (megatron/core/safe_globals.py is Megatron's own list of them).
_OBJECT_NAMES = frozenset(
    {
        "_codecs.encode",
        "_io.BytesIO",
        "argparse.Namespace",
        "megatron.core.enums.ModelType",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        "megatron.core.rerun_state_machine.RerunDiagnostic",
        "megatron.core.rerun_state_machine.RerunMode",
        "megatron.core.rerun_state_machine.RerunState",
        "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.transformer.enums.CudaGraphModule",
        "megatron.core.transformer.enums.CudaGraphScope",
        "megatron.core.transformer.enums.InferenceCudaGraphScope",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "signal.Signals",
        "transformer_engine.common.recipe.DelayedScaling",
        "transformer_engine.common.recipe.Float8BlockScaling",
        "transformer_engine.common.recipe.Float8CurrentScaling",
        "transformer_engine.common.recipe.Format",
        "transformer_engine.common.recipe.MXFP8BlockScaling",
        "transformer_engine.common.recipe.NVFP4BlockScaling",
        "transformer_engine.common.recipe._FormatHelper",
        "types.SimpleNamespace",
    }
)
# Opcodes that name a class in a way that cannot be followed without unpickling. torch.save writes
# protocol 2, which has none of them.
_UNREADABLE = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")


class StandIn:
    """Holds the state of an object without looking up its class, such as an enum of Megatron."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_index(path: Path) -> Metadata:
    """Read the ``.metadata`` of a torch_dist checkpoint.

    Raises:
        UnsafeCheckpointError: The pickle names something that no index holds.
        Exception: The pickle is damaged; any class is possible.
    """
    with path.open("rb") as file:
        index = _IndexUnpickler(file, path).load()
    if not isinstance(index, Metadata) or not _is_sound(index):
        raise pickle.UnpicklingError("it is not the index of a torch_dist checkpoint")
    return index


def _is_sound(index: Metadata) -> bool:
    """Return whether the parts that we read have the types that torch gives them."""
    entries = getattr(index, "state_dict_metadata", None)
    places = getattr(index, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict) or not places:
        return False
    return all(
        isinstance(place, filesystem._StorageInfo)
        and isinstance(place.relative_path, str)
        and isinstance(place.offset, int)
        and isinstance(place.length, int)
        for place in places.values()
    )


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return only sealed classes of the list, dtypes, sizes, layouts and paths."""
        found = _index_names().get((module, name))
        if found is None:
            raise _unsafe(f"{module}.{name}", str(self._path))
        return found


@functools.cache
def _index_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("torch", name): value for name, value in vars(torch).items() if _is_dtype(value)
    }
    for original in _INDEX_CLASSES:
        names[original.__module__, original.__name__] = _Sealed(original)
    names["torch", "Size"] = torch.Size
    names["torch.serialization", "_get_layout"] = _layout
    for module in ("pathlib", "pathlib._local"):
        names[module, "PosixPath"] = _path
    return names


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _layout(name: str) -> torch.layout:
    """Do what torch's function of that name does, so that a pickle cannot reach torch's."""
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"it names the layout {name}")
    return layout


def _path(*parts: str) -> Path:
    return Path(*parts)


class _Sealed(type):
    """A class that creates instances of another one, and that a pickle cannot change.

    The BUILD opcode sets attributes of any object. On a class it would change that class for the
    whole process.
    """

    def __new__(cls, original: Any) -> "_Sealed":
        def make(_: Any, *args: Any) -> Any:
            return original(*args) if issubclass(original, Enum) else original.__new__(original)

        return super().__new__(cls, original.__name__, (), {"__new__": make, "__slots__": ()})

    def __init__(cls, original: Any) -> None:
        super().__init__(original.__name__, (), {})

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes the class {cls.__name__}")


def read_object(content: bytes, source: str) -> Any:
    """Read what ``torch.save`` wrote, with torch's restricted unpickler.

    Args:
        content: The bytes.
        source: Where they come from, for the error message.

    Raises:
        UnsafeCheckpointError: The object names something beyond tensors and plain classes.
        RuntimeError: The bytes are damaged.
        ValueError: The bytes are damaged.
        pickle.UnpicklingError: The bytes are damaged.
    """
    allowed: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)):
        if name.split(".")[0] in _STOOD_IN:
            allowed.append((type(name.rpartition(".")[2], (StandIn,), {}), name))
        elif name in _PLAIN:
            allowed.append((_PLAIN[name], name))
        else:
            raise _unsafe(name, source)
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def check_object(content: bytes, source: str) -> None:
    """Compare every name in an object with the list, without unpickling anything.

    Raises:
        UnsafeCheckpointError: A name is not on the list, or the pickle hides its names.
        RuntimeError: The bytes are damaged.
        ValueError: The bytes are damaged.
    """
    # This is torch's own reader, not zipfile: the two could read different records of one name.
    archive: Any = torch._C.PyTorchFileReader(io.BytesIO(content))
    if archive.has_record("constants.pkl"):
        raise _unsafe("a TorchScript program", source)
    torch_names = _torch_names()
    for opcode, argument, _ in pickletools.genops(archive.get_record("data.pkl")):
        if opcode.name in _UNREADABLE:
            raise _unsafe(f"an object by the opcode {opcode.name}", source)
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if name not in _OBJECT_NAMES and name not in torch_names:
                raise _unsafe(name, source)


def _torch_names() -> set[str]:
    """Return what torch's restricted unpickler always accepts: tensors, storages, dtypes."""
    from torch import _weights_only_unpickler

    return set(_weights_only_unpickler._get_allowed_globals())


def _unsafe(name: str, source: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{source} names {name}, which no Megatron checkpoint holds; it was not opened, because "
        "that could run code"
    )
