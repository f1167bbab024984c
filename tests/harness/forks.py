"""Runs command lines, and jobs of several ranks, in forks of a process that has made the imports.

A command line of this project spends seconds on imports, and tests start hundreds of them. Each
fork is a process of its own: it has its own arguments, environment, working directory and output,
ends by itself, and leaves nothing to its siblings. What a fork cannot show is a script that does
not import, so that each script is also started plainly somewhere. The ranks of a job are started by
torchrun's own agent; tests of restarts and of signals use its command.
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
# What is imported beforehand: Megatron on this machine's device, which changes torch for good, or
# what the tools for exported models need, which leave torch alone.
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
    """Run a Python script as a command, with the output of `subprocess.run`.

    Args:
        script: the script.
        arguments: of its command line.
        preload: one of `PRELOADS`.
        ranks: processes of a distributed job, under torchrun's agent; 0 is no job.
        environment: added to that of this process.
        timeout: seconds until it is killed.

    Raises:
        TimeoutError: it took longer.
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
    """The process that forks; one for each preload and each process that tests."""

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
        """Run one command; returns its exit code, negative for a signal."""
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
    """Fork for every line of standard input; answer with exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    before = set(os.environ)
    with contextlib.redirect_stdout(sys.stderr):  # logging keeps the stream that it finds
        _import(sys.argv[1])
    sys.stderr.flush()  # or every fork would print what is left in the buffer
    prepared = {name: os.environ[name] for name in set(os.environ) - before}
    for line in sys.stdin:
        request = json.loads(line)
        request["environment"] = {**prepared, **request["environment"]}
        answers.write(f"{_run(request)}\n")
        answers.flush()


def _run(request: dict[str, Any]) -> int:
    """Run a command or a job; returns its exit code."""
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
    """In the fork: become the command; never returns."""
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
    """What torchrun does, but that the agent forks the ranks instead of starting a program."""
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
