"""CUDA_DEVICE_MAX_CONNECTIONS fits the layout of the run, and a user's value is never changed."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.compat import connections
from topk_megatron.compat.connections import (
    NO_GPU,
    VARIABLE,
    choose_connections,
    describe_connections,
    peek,
    set_connections,
)

HOPPER, BLACKWELL, UNKNOWN = 9, 10, None
TP = ("--tensor-model-parallel-size", "2")
CP = ("--context-parallel-size", "2")
OVERLAP = ("--overlap-moe-expert-parallel-comm",)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that the end of the test restores the variable
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(connections, "_ours", None)
    monkeypatch.setattr(connections, "_reason", "")


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ((), HOPPER, None),
        ((*TP, "--sequence-parallel"), HOPPER, "1"),
        (CP, HOPPER, "1"),
        (TP, UNKNOWN, "1"),
        (("--tensor-model-parallel-size=4",), HOPPER, "1"),
        (("--use-mp-args-from-checkpoint-args",), HOPPER, "1"),
        (TP, BLACKWELL, None),
        (("--tensor-model-parallel-size", "1"), HOPPER, None),
        (("--pipeline-model-parallel-size", "4"), HOPPER, None),
        (("--use-torch-fsdp2",), HOPPER, None),
        (("--use-megatron-fsdp",), HOPPER, None),
        ((*TP, "--use-torch-fsdp2"), HOPPER, None),
        ((*CP, "--use-megatron-fsdp"), UNKNOWN, None),
        (OVERLAP, HOPPER, "32"),
        ((*TP, *OVERLAP), HOPPER, "32"),
        (TP, NO_GPU, "1"),
        ((*TP, "--use-megatron-fsdp"), NO_GPU, None),
    ],
)
def test_the_layout_decides(
    flags: tuple[str, ...], capability: int | None, expected: str | None
) -> None:
    assert choose_connections(peek(flags), capability)[0] == expected


@pytest.mark.parametrize("flags", [(), (*TP, "--micro-batch-size", "2"), ("--use-torch-fsdp2",)])
@pytest.mark.parametrize("value", ["1", "8"])
def test_a_value_that_the_user_exported_stays(
    value: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    set_connections(peek(flags), HOPPER)
    assert os.environ[VARIABLE] == value
    wanted = f"topk_megatron: {VARIABLE} is {value}: exported by the user"
    assert describe_connections() == wanted


def test_a_second_layout_in_the_process_replaces_the_first_ones_value() -> None:
    set_connections(peek(TP), HOPPER)
    assert os.environ[VARIABLE] == "1"
    assert "is 1: tensor and context parallelism" in describe_connections()
    set_connections(peek(("--use-megatron-fsdp",)), HOPPER)
    assert VARIABLE not in os.environ
    assert "is unset: FSDP needs more than 1" in describe_connections()
    set_connections(peek(TP), HOPPER)
    assert os.environ[VARIABLE] == "1"


@pytest.mark.parametrize("flags", [("--tensor-model-parallel-size", "two"), (TP[0],)])
def test_a_command_line_with_mistakes_is_left_to_megatrons_parser(flags: tuple[str, ...]) -> None:
    assert peek(flags) == peek(())


def test_the_flags_are_megatrons() -> None:
    code = f"""
import sys; sys.argv = ["x"]
from topk_megatron.compat import prepare_device
device = prepare_device()
from megatron.training.arguments import parse_args
from topk_megatron.train.arguments import arguments_provider
args = vars(parse_args(arguments_provider(device)))
assert {set(vars(peek(())))!r} <= args.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("flags", "expected"), [(TP, "1"), (("--use-torch-fsdp2",), None)])
def test_the_variable_is_set_before_torch_looks_for_a_device(
    flags: tuple[str, ...], expected: str | None, tmp_path: Path
) -> None:
    """Looking may start CUDA, and CUDA reads the variable when it starts."""
    script = tmp_path / "look.py"
    script.write_text(
        f"""
import os, torch
seen = []
look = torch.cuda.is_available
torch.cuda.is_available = lambda: seen.append(os.environ.get({VARIABLE!r})) or look()
from topk_megatron.compat import select
select.compute_capability = lambda: {HOPPER}
select.prepare_device()
assert seen and seen[0] == {expected!r}, seen
assert os.environ.get({VARIABLE!r}) == {expected!r}
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["Dockerfile", "examples/slurm/node.sh"])
def test_nothing_that_starts_the_ranks_sets_it_for_every_layout(path: str) -> None:
    assert VARIABLE not in (REPOSITORY / path).read_text()


def test_megatrons_arguments_have_the_last_word() -> None:
    """Defaults and checkpoints may set a layout that the command line does not show."""
    set_connections(peek(()), HOPPER)
    assert VARIABLE not in os.environ
    read = Namespace(**{**vars(peek(())), "tensor_model_parallel_size": 2})
    set_connections(read, HOPPER)
    assert os.environ[VARIABLE] == "1"
