"""Fixtures that several test folders share: text, a tokenizer and a dataset."""

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.harness.forks import REPOSITORY, run_forked
from tests.harness.processor import describe_processor, read_cpuinfo

SPEAKERS = REPOSITORY / "examples" / "deepspeed" / "speakers.jsonl"
TOOLS_OF_MEGATRON = ("preprocess_data.py", "sample.py")

# No test asserts wall time, and the first example of a kernel also loads it.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def wants_gpus(arguments: list[str], start: Path) -> bool:
    """Return whether pytest was asked for tests/gpu and nothing else.

    Args:
        arguments: pytest's positional arguments.
        start: the folder to which they are relative.
    """
    gpu = REPOSITORY / "tests" / "gpu"
    paths = [(start / argument.split("::")[0]).resolve() for argument in arguments]
    return bool(paths) and all(path == gpu or gpu in path.parents for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all but tests/gpu, before anything asks torch, which remembers the answer.

    The other tests start several ranks and compare them with runs on a CPU.
    """
    if not wants_gpus(config.args, config.invocation_params.dir):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
EXPORTED_CONNECTIONS = os.environ.get(CONNECTIONS)


@pytest.fixture(autouse=True)
def _connections_as_exported() -> Iterator[None]:
    """Undo a choice of the test process, which the next run would keep as a user's."""
    yield
    os.environ.pop(CONNECTIONS, None)
    if EXPORTED_CONNECTIONS is not None:
        os.environ[CONNECTIONS] = EXPORTED_CONNECTIONS


def pytest_report_header() -> list[str]:
    """Processor and versions at the head of every run: rounding depends on them."""
    versions = [f"{name} {_version(name)}" for name in ("torch", "megatron-core")]
    return [f"processor: {describe_processor(read_cpuinfo())}", f"versions: {', '.join(versions)}"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_tool(name: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a script of tools/ in a fork, which saves its imports."""
    preload = "megatron" if name in TOOLS_OF_MEGATRON else "plain"
    return run_forked(REPOSITORY / "tools" / name, *arguments, preload=preload)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text without a download: the licence and the examples' passages, a file per document.

    It is the same at every commit. The project's own sources would be another text after each
    change, and with it other near ties, at which two correct runs may part (docs/numerics.md).
    """
    directory = tmp_path_factory.mktemp("corpus")
    examples = REPOSITORY / "examples"
    texts = [(REPOSITORY / "LICENSE").read_text()]
    for path in (*sorted((examples / "quickstart" / "tasks").glob("*.jsonl")), SPEAKERS):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            prompt, choices = entry.get("context"), entry.get("choices")
            end = choices[entry["answer"]] if choices else entry["completion"]
            texts.append(f"{prompt or entry['prompt']}{end}\n")
    for number, text in enumerate(texts):
        (directory / f"{number:03d}.txt").write_text(text)
    return directory


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 512 pieces."""
    model = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    done = run_tool(
        "train_tokenizer.py", "--input", f"{corpus}/*.txt", "--output", model, "--vocab-size", "512"
    )
    assert done.returncode == 0, done.stderr
    return model


@pytest.fixture(scope="session")
def dataset(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of the tokenized corpus."""
    prefix = tmp_path_factory.mktemp("dataset") / "text"
    done = run_tool(
        "preprocess_data.py",
        *("--input", f"{corpus}/*.txt", "--output-prefix", prefix),
        *("--tokenizer-model", tokenizer, "--workers", "2"),
    )
    assert done.returncode == 0, done.stderr
    return prefix
