"""Runs command lines, and jobs of several ranks, in forks of a process that has made the imports.

A command line of this project spends seconds on imports, and tests start hundreds of them. Each
fork is a process of its own: it has its own arguments, environment, working directory and output,
ends by itself, and leaves nothing to its siblings. What a fork cannot show is a script that does
not import, so that each script is also started plainly somewhere; the ranks of a job get the
variables that torchrun sets, and tests of the launcher, of restarts and of signals use torchrun
itself.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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
        ranks: processes of a distributed job; 0 is no job. When one fails the others are killed.
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
            [sys.executable, "-m", "topk_megatron.testing.forks", preload],
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
    _import(sys.argv[1])
    prepared = {name: os.environ[name] for name in set(os.environ) - before}
    for line in sys.stdin:
        request = json.loads(line)
        request["environment"] = {**prepared, **request["environment"]}
        answers.write(f"{_run(request)}\n")
        answers.flush()


def _run(request: dict[str, Any]) -> int:
    """Run a command or a job; returns the exit code of the first process that failed, or 0."""
    environments = [request["environment"]]
    if request["ranks"]:
        environments = [{**environments[0], **more} for more in _rank_variables(request["ranks"])]
    children = set()
    for environment in environments:
        child = os.fork()
        if child == 0:
            _be(request, environment)
        children.add(child)
    deadline = time.monotonic() + request["timeout"]
    code = 0
    while children and code == 0:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.discard(child)
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            code = _TIMED_OUT
        else:
            time.sleep(0.01)
    for child in children:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code


def _rank_variables(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    return [{**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]


def _import(preload: str) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if preload == "megatron":
        from topk_megatron.device import prepare_device

        prepare_device()
        import megatron.training.training  # noqa: F401

        import topk_megatron.train.data
        import topk_megatron.train.main
        import topk_megatron.train.resume  # noqa: F401


def _be(request: dict[str, Any], environment: dict[str, str]) -> None:
    """In the fork: become the command; never returns."""
    code = 1
    try:
        os.setsid()
        for number, path in enumerate(request["outputs"], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(REPOSITORY)
        sys.argv = request["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = _code_of(ended)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code_of(ended: SystemExit) -> int:
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
        return 1
    return int(ended.code or 0)


if __name__ == "__main__":
    _serve()
