"""Plants pickles that run code in copies of checkpoints, one in each place that holds a pickle."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from topk_megatron.checkpoint.reader import COMMON_KEY


class Touch:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def gadget(marker: Path) -> bytes:
    """Return a pickle that runs a command through names of torch's checkpoint modules alone.

    ``_get_device_module`` is ``getattr`` on the object that ``torch._utils`` calls ``torch``. With
    it, the pickle fetches the module ``torch._utils``, replaces its ``torch`` with ``os``, and
    fetches ``os.system``. An allow list of whole modules would accept it.
    """
    module = b"torch.distributed.checkpoint.filesystem"
    function = b"c" + module + b"\n_get_device_module\nq\x00"
    change = b"}" + _text("torch") + b"c" + module + b"\nos\nsb0"
    call = b"h\x00" + _text("system") + b"\x85R" + _text(f"touch {marker}") + b"\x85R."
    return b"\x80\x02" + function + _text("_utils") + b"\x85R" + change + call


def _text(text: str) -> bytes:
    """Return the BINUNICODE opcode for a text."""
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def reduce_call(marker: Path) -> bytes:
    """Return the plain form: a pickle that calls os.system."""
    return pickle.dumps(Touch(marker), protocol=2)


def modern_call(marker: Path) -> bytes:
    """Return the same call in protocol 4, where names are on the stack, not in the opcode."""
    return pickle.dumps(Touch(marker), protocol=4)


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "call": reduce_call,
    "call by protocol 4": modern_call,
    "module gadget": gadget,
}


def as_saved(payload: bytes) -> bytes:
    """Put the payload into the archive that torch.save writes."""
    saved = io.BytesIO()
    torch.save([{"iteration": 10}], saved)
    content = io.BytesIO()
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
    return content.getvalue()


def _index(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())


def in_index(directory: Path, payload: bytes) -> None:
    """Replace the index."""
    (directory / ".metadata").write_bytes(payload)


def in_common_state(directory: Path, payload: bytes) -> None:
    """Replace the arguments, which are in a data file; the index stays clean."""
    _replace_object(directory, COMMON_KEY, payload)


def in_common_file(directory: Path, payload: bytes) -> None:
    """Write ``common.pt``, where older versions of Megatron kept the arguments."""
    (directory / "common.pt").write_bytes(as_saved(payload))


def in_another_object(directory: Path, payload: bytes) -> None:
    """Replace an object that only Megatron's own loader opens, such as a generator's state."""
    index = _index(directory)
    key = next(
        key
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata) and key != COMMON_KEY
    )
    _replace_object(directory, key, payload)


def _replace_object(directory: Path, key: str, payload: bytes) -> None:
    index = _index(directory)
    (place,) = (info for name, info in index.storage_data.items() if name.fqn == key)
    content = as_saved(payload)
    path = directory / place.relative_path
    place.offset, place.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    (directory / ".metadata").write_bytes(pickle.dumps(index))


PLACES = {
    "index": in_index,
    "common state": in_common_state,
    "common file": in_common_file,
    "another object": in_another_object,
}
