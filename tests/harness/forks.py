"""Runs command lines and multi-rank jobs in forks of a process that has already done the imports.

A command of this project spends seconds on imports, and tests start hundreds of commands. Each fork
is an independent process with its own arguments, environment, working directory and output, and
shares no state with its siblings. A fork cannot reveal a script whose imports fail, so some test
also starts each script without one. torchrun's own agent starts the ranks of a job; tests of
restarts and signals use the torchrun command instead.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Imports made in advance: "megatron" prepares this machine's device, which patches torch for good;
# "plain" serves the tools for exported models, which leave torch alone.
PRELOADS = ("megatron", "plain")
_TIMED_OUT = 1000


def run_forked(
    script: Path,
    *arguments: str | Path,
    preload: str = "plain",
    ranks: int = 0,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> "subprocess.CompletedProcess[str]":
    """Run a Python script as a command, and return what `subprocess.run` would.

    Args:
        script: the script.
        arguments: its command-line arguments.
        preload: one of `PRELOADS`.
        ranks: number of ranks of a distributed job, under torchrun's agent; 0 runs a plain command.
        environment: variables added to those of this process.
        timeout: seconds until the command is killed.

    Raises:
        TimeoutError: if the command took longer.
    """
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / name for name in ("stdout", "stderr")]
        request = {
            "argv": argv,
            "ranks": ranks,
            "environment": {**os.environ, **(environment or {})},
            "outputs": [str(path) for path in outputs],
            "timeout": timeout,
        }
        code = _server(preload).ask(request)
        out, err = (path.read_text(errors="replace") for path in outputs)
    if code == _TIMED_OUT:
        raise TimeoutError(f"{' '.join(argv)} took more than {timeout} s:\n{(out + err)[-3000:]}")
    return subprocess.CompletedProcess(argv, code, out, err)


class _Server:
    """The process that forks: one per preload and test process."""

    def __init__(self, preload: str) -> None:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.forks", preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, request: dict[str, Any]) -> int:
        """Run one command, and return its exit code, which is negative for a signal."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the forking process ended with {process.wait()}"
        return int(answer)


@functools.cache
def _server(preload: str) -> _Server:
    return _Server(preload)


def _serve() -> None:
    """Fork for every line of standard input, and answer with exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the imports must not look like an answer
    before = set(os.environ)
    with contextlib.redirect_stdout(sys.stderr):  # logging keeps the stream that it finds
        _import(sys.argv[1])
    sys.stderr.flush()  # otherwise every fork would print the rest of the buffer
    prepared = {name: os.environ[name] for name in set(os.environ) - before}
    for line in sys.stdin:
        request = json.loads(line)
        request["environment"] = {**prepared, **request["environment"]}
        answers.write(f"{_run(request)}\n")
        answers.flush()


def _run(request: dict[str, Any]) -> int:
    """Run a command or a job, and return its exit code."""
    child = os.fork()
    if child == 0:
        _be(request)
    deadline = time.monotonic() + request["timeout"]
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _TIMED_OUT


def _import(preload: str) -> None:
    import transformers  # noqa: F401

    if preload == "megatron":
        from topk_megatron.compat import prepare_device

        prepare_device()
        import megatron.training.training  # noqa: F401

        import topk_megatron.train.data
        import topk_megatron.train.main
        import topk_megatron.train.resume  # noqa: F401


def _be(request: dict[str, Any]) -> None:
    """Become the command, in the fork; never return."""
    code = 1
    try:
        os.setsid()
        for number, path in enumerate(request["outputs"], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(REPOSITORY)
        if request["ranks"]:
            _launch(request["argv"], request["ranks"])
        else:
            _main(request["argv"])
        code = 0
    except SystemExit as ended:
        code = _code_of(ended)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(argv: list[str]) -> None:
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


def _launch(argv: list[str], ranks: int) -> None:
    """Do what torchrun does, except that the agent forks the ranks instead of executing them."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, _main)(argv)


def _code_of(ended: SystemExit) -> int:
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
        return 1
    return int(ended.code or 0)


if __name__ == "__main__":
    _serve()
