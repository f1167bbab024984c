"""Tests that the restricted unpicklers accept only what torch and Megatron write."""

import io
import pickle
from argparse import Namespace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tests.checkpoint.hostile import PAYLOADS, as_saved
from topk_megatron.checkpoint.pickles import StandIn, check_object, read_index, read_object
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.errors import UnsafeCheckpointError


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def index_of(tmp_path: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {"weight": torch.arange(6.0).view(2, 3), "object": {"a": 1}}
    save(state, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    return tmp_path / "checkpoint" / ".metadata"


def test_index_reads_as_torch_reads_it(tmp_path: Path) -> None:
    path = index_of(tmp_path)
    expected = pickle.loads(path.read_bytes())
    index = read_index(path)
    assert index == expected
    assert hash(next(iter(index.storage_data))) == hash(next(iter(expected.storage_data)))
    key = MetadataIndex("object.a")
    assert index.storage_data[key] == expected.storage_data[key]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_index_is_refused_by_name_and_does_not_run(payload: str, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(PAYLOADS[payload](tmp_path / "ran"))
    with pytest.raises(UnsafeCheckpointError, match="it was not opened"):
        read_index(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("read", [read_object, check_object])
def test_hostile_object_is_refused_and_does_not_run(
    read: Any, payload: str, tmp_path: Path
) -> None:
    content = as_saved(PAYLOADS[payload](tmp_path / "ran"))
    with pytest.raises((UnsafeCheckpointError, pickle.UnpicklingError)):
        read(content, "object")
    assert not (tmp_path / "ran").exists()


def test_payloads_do_run_where_nothing_holds_them_back(tmp_path: Path) -> None:
    original = torch
    for name, payload in PAYLOADS.items():
        marker = tmp_path / name.replace(" ", "-")
        try:
            pickle.loads(payload(marker))
        finally:
            torch._utils.torch = original  # pyright: ignore[reportAttributeAccessIssue]
        assert marker.exists(), name


def test_a_pickle_cannot_change_a_class_of_the_index(tmp_path: Path) -> None:
    """BUILD with a slot state sets attributes; on a class it would change the whole process."""
    module = filesystem._StorageInfo.__module__.encode()
    build = b"\x80\x02c" + module + b"\n_StorageInfo\n(N}X\x04\x00\x00\x00evilK\x01stb."
    assert isinstance(pickle.loads(build), type)
    assert filesystem._StorageInfo.__dict__["evil"] == 1
    del filesystem._StorageInfo.evil  # pyright: ignore[reportAttributeAccessIssue]
    path = tmp_path / ".metadata"
    path.write_bytes(build)
    with pytest.raises(pickle.UnpicklingError, match="changes the class"):
        read_index(path)
    assert not hasattr(filesystem._StorageInfo, "evil")


@pytest.mark.parametrize("name", ["os", "_get_device_module", "uuid", "FileSystemReader"])
def test_no_module_is_allowed_as_a_whole(name: str, tmp_path: Path) -> None:
    module = filesystem.__name__.encode()
    assert hasattr(filesystem, name)
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x02c" + module + b"\n" + name.encode() + b"\n.")
    with pytest.raises(UnsafeCheckpointError, match=f"filesystem.{name}"):
        read_index(path)


def test_index_without_its_parts_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    for content in (Metadata({}), Metadata({}, storage_data={}), Metadata({}, storage_data={1: 2})):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(pickle.UnpicklingError, match="not the index"):
            read_index(path)


def test_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    path = index_of(tmp_path)
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        index = pickle.loads(path.read_bytes())
        next(iter(index.storage_data.values())).relative_path = name
        path.write_bytes(pickle.dumps(index))
        with pytest.raises(UnsafeCheckpointError, match="elsewhere"):
            CheckpointReader(path.parent)


class Colour(Enum):
    RED = 1


def test_objects_of_known_kinds_come_back_and_others_stand_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = Namespace(lr=0.1, dtype=torch.bfloat16, tensor=torch.arange(3), names={"a", "b"})
    back = read_object(saved([{"args": args}]), "object")[0]["args"]
    assert back.tensor.equal(args.tensor)
    assert (back.lr, back.dtype, back.names) == (0.1, torch.bfloat16, {"a", "b"})
    monkeypatch.setattr(Colour, "__module__", "megatron.of.another.version")
    monkeypatch.setitem(
        __import__("sys").modules,
        "megatron.of.another.version",
        __import__(__name__, fromlist=["x"]),
    )
    content = saved([Namespace(colour=Colour.RED)])
    stood_in = read_object(content, "object")[0].colour
    assert isinstance(stood_in, StandIn)
    assert type(stood_in).__name__ == "Colour"
    assert stood_in.args == (1,)


def test_generator_states_pass_the_check_before_megatron_opens_them() -> None:
    import numpy as np

    state = {"numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    check_object(saved([state]), "object")
    with pytest.raises(UnsafeCheckpointError, match=r"test_pickles\.Colour"):
        check_object(saved([Colour.RED]), "object")


def test_torchscript_program_is_not_an_object(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    content = (tmp_path / "program.pt").read_bytes()
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        check_object(content, "object")
    with pytest.raises(ValueError, match="torchscript"):
        read_object(content, "object")
