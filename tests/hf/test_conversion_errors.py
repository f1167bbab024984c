"""Bad input, full disks and kills: one clear line, exit code 2, and nothing half-written."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_tool
from tests.harness.launch import REPOSITORY
from tests.harness.synthetic import synthetic_config, write_synthetic_checkpoint
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.config import TopKConfig
from topk_megatron.errors import CheckpointError
from topk_megatron.hf import safetensors
from topk_megatron.hf.export import ExportSettings, export_checkpoint
from topk_megatron.hf.restore import RestoreSettings, restore_checkpoint

TOPK = TopKConfig(hidden_size=32, num_layers=3, k=4, layers=(0, 1))
CONFIG = synthetic_config()


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Path) -> Path:
    directory = tmp_path / "megatron"
    write_synthetic_checkpoint(directory, CONFIG, topk=TOPK, tokenizer_model=tokenizer)
    return directory


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, folder, ExportSettings())
    return folder


TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"


class Refusal:
    """Runs the tool in this process; a subprocess each would cost seconds of imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._captured = monkeypatch, capsys

    def __call__(self, command: str, load: Path, save: Path, *flags: str) -> str:
        """The one line of a refused conversion; checks that nothing was written."""
        before = sorted(save.parent.iterdir())
        arguments = [TOOL, command, "--load", load, "--save", save, *flags]
        self._patch.setattr(sys, "argv", list(map(str, arguments)))
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOL), run_name="__main__")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        assert exit_.value.code == 2
        assert sorted(save.parent.iterdir()) == before
        line = self._captured.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(monkeypatch, capsys)


def data_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("iter_*/*.distcp"))


class TestToHuggingFace:
    def test_truncated_shard(self, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
        os.truncate(data_file(checkpoint), 5000)
        line = refusal("to-hf", checkpoint, tmp_path / "out")
        assert "has 5000 bytes of" in line

    def test_missing_shard(self, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
        data_file(checkpoint).unlink()
        assert "is missing" in refusal("to-hf", checkpoint, tmp_path / "out")

    def test_overwritten_shard(self, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
        file = data_file(checkpoint)
        file.write_bytes(b"\0" * file.stat().st_size)
        assert "damaged" in refusal("to-hf", checkpoint, tmp_path / "out")

    def test_damaged_index(self, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
        next(checkpoint.glob("iter_*/.metadata")).write_bytes(b"nonsense")
        assert "cannot be read" in refusal("to-hf", checkpoint, tmp_path / "out")

    def test_folder_that_exists(self, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert "exists already" in refusal("to-hf", checkpoint, tmp_path / "out")

    def test_folder_without_checkpoint(self, refusal: Refusal, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        line = refusal("to-hf", tmp_path / "empty", tmp_path / "out")
        assert "holds no complete torch_dist checkpoint" in line

    def test_iteration_that_is_not_there(
        self, refusal: Refusal, checkpoint: Path, tmp_path: Path
    ) -> None:
        line = refusal("to-hf", checkpoint, tmp_path / "out", "--iteration", "7")
        assert "it has 10" in line

    def test_tokenizer_that_is_gone(self, refusal: Refusal, tmp_path: Path) -> None:
        gone = tmp_path / "gone.model"
        write_synthetic_checkpoint(tmp_path / "m", CONFIG, topk=TOPK, tokenizer_model=gone)
        assert "--tokenizer-model" in refusal("to-hf", tmp_path / "m", tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({}, "has no TopK settings; if it is a dense model of stock Megatron"),
            ({"extra": {"mtp.layers.0.weight": (4, 4)}}, "holds mtp.layers.0.weight"),
            ({"arguments": {"num_layers": 2}}, "of which its own settings account for 2"),
            ({"arguments": {"num_layers": 4}}, "of layer 3"),
            ({"arguments": {"kv_channels": 16}}, "has shape [64, 32] where"),
            ({"arguments": {"topk": {"k": 4}}}, "missing or unknown entries"),
            ({"arguments": {"topk": {**TOPK.to_dict(), "new": 1}}}, "entries: new"),
            ({"arguments": {"tokenizer_vocab_size": 600}}, "fewer than the 600"),
            ({"arguments": {"mtp_num_layers": 1}}, "mtp_num_layers=1"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_checkpoint_of_another_model(
        self, change: dict[str, Any], complaint: str, tmp_path: Path
    ) -> None:
        topk = None if not change else TOPK
        write_synthetic_checkpoint(tmp_path / "m", CONFIG, **{"topk": topk, **change})
        settings = ExportSettings(tokenizer=False)
        with pytest.raises(CheckpointError) as error:
            export_checkpoint(tmp_path / "m", tmp_path / "out", settings)
        assert complaint in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]

    def test_dense_is_only_what_has_no_topk_layer(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="--dense would export another"):
            export_checkpoint(checkpoint, tmp_path / "out", ExportSettings(dense=True))
        write_synthetic_checkpoint(tmp_path / "stock", CONFIG)
        settings = ExportSettings(dense=True, tokenizer=False)
        source = export_checkpoint(tmp_path / "stock", tmp_path / "out", settings)
        assert source.config["topk"]["layers"] == []


class TestToMegatron:
    def test_folder_without_tokenizer(
        self, refusal: Refusal, exported: Path, tmp_path: Path
    ) -> None:
        for file in exported.glob("tokenizer*"):
            file.unlink()
        assert "has no tokenizer" in refusal("to-megatron", exported, tmp_path / "out")

    def test_truncated_weights(self, refusal: Refusal, exported: Path, tmp_path: Path) -> None:
        os.truncate(exported / "model.safetensors", 9000)
        assert "damaged" in refusal("to-megatron", exported, tmp_path / "out")

    def test_missing_weights(self, refusal: Refusal, exported: Path, tmp_path: Path) -> None:
        (exported / "model.safetensors").unlink()
        assert "neither" in refusal("to-megatron", exported, tmp_path / "out")

    def test_edited_configuration(self, refusal: Refusal, exported: Path, tmp_path: Path) -> None:
        config = json.loads((exported / "config.json").read_text())
        config["topk"]["k"] = 5
        (exported / "config.json").write_text(json.dumps(config))
        assert "config.json has topk=" in refusal("to-megatron", exported, tmp_path / "out")

    def test_model_of_another_kind(self, refusal: Refusal, exported: Path, tmp_path: Path) -> None:
        (exported / "config.json").write_text('{"model_type": "gpt2"}')
        assert "model_type 'gpt2'" in refusal("to-megatron", exported, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; where mounting is not allowed, writes that fail as on one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("no file system can be mounted here; the patched write covers it")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("command", ["to-hf", "to-megatron"])
def test_full_disk_leaves_nothing(
    command: str, refusal: Refusal, exported: Path, checkpoint: Path, small_disk: Path
) -> None:
    load = checkpoint if command == "to-hf" else exported
    assert "No space left on device" in refusal(command, load, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_error_is_the_last_line_of_the_command_and_exits_with_2(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    done = run_tool(TOOL.name, "to-hf", "--load", checkpoint, "--save", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_size_of_the_vocabulary_comes_from_the_tokenizer_where_arguments_lack_it(
    tokenizer: Path, exported: Path, tmp_path: Path
) -> None:
    config = {**CONFIG, "vocab_size": 640}
    stock = tmp_path / "stock"
    unknown = {"tokenizer_vocab_size": None}
    write_synthetic_checkpoint(stock, config, tokenizer_model=tokenizer, arguments=unknown)
    with pytest.raises(CheckpointError, match="--tokenizer-model"):
        export_checkpoint(stock, tmp_path / "out", ExportSettings(dense=True))
    for name, model in (("file", tokenizer), ("folder", exported)):
        settings = ExportSettings(dense=True, tokenizer_model=str(model), tokenizer=False)
        source = export_checkpoint(stock, tmp_path / name, settings)
        assert source.config["vocab_size"] == 512
        assert source.padded_vocabulary == 640


def test_failing_write_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "_close", close)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was left"):
        export_checkpoint(checkpoint, tmp_path / "out", ExportSettings(shard_size=8000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron"]


_SLOW_WRITE = """
import sys, time
from topk_megatron.errors import CheckpointError
from topk_megatron.hf import safetensors
original = safetensors.ShardWriter.add
def add(self, name, tensor):
    original(self, name, tensor)
    print("WRITING", flush=True)
    time.sleep(1)
safetensors.ShardWriter.add = add
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_conversion_leaves_nothing_that_loads(
    number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    tool = REPOSITORY / "tools" / "convert_checkpoint.py"
    arguments = [tool, "to-hf", "--load", checkpoint, "--save", tmp_path / "out"]
    command = [sys.executable, "-c", _SLOW_WRITE, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "WRITING\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "error: stopped by a signal" in errors
        assert "Traceback" not in errors
    left = [path for path in tmp_path.iterdir() if path.name != "megatron"]
    if number == signal.SIGKILL:
        assert [path.name[:12] for path in left] == [".out.partial"]
        assert not (left[0] / "config.json").exists()
        export_checkpoint(checkpoint, tmp_path / "out", ExportSettings())
        left = [path for path in tmp_path.iterdir() if path.name not in ("megatron", "out")]
    assert left == []


def test_small_shards_give_the_same_tensors_and_an_index(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_checkpoint(checkpoint, tmp_path / "one", ExportSettings())
    export_checkpoint(checkpoint, tmp_path / "many", ExportSettings(shard_size=20_000))
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / safetensors.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert set(index["weight_map"]) == set(whole)
    for file in files:
        for name, tensor in load_file(tmp_path / "many" / file).items():
            assert index["weight_map"][name] == file
            assert tensor.equal(whole[name])


def test_way_back_is_bitwise_whatever_the_shards(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "hf", ExportSettings(shard_size=20_000))
    restore_checkpoint(tmp_path / "hf", tmp_path / "back", RestoreSettings(tp=2))
    shutil.rmtree(tmp_path / "hf")
    first, second = (
        CheckpointReader(path / "iter_0000010") for path in (checkpoint, tmp_path / "back")
    )
    assert set(first.tensors) == set(second.tensors)
    for key in first.tensors:
        assert first.read(key).equal(second.read(key)), key
    assert second.args.topk == first.args.topk
    assert Path(second.args.tokenizer_model).is_file()
