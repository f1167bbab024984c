"""Runs the real pretraining under torchrun with gloo ranks, and reads its logs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.harness.forks import run_forked
from topk_megatron.files import read_scalars

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "pretrain_topk_gpt.py"

# A model small enough that a step takes tens of milliseconds on one core.
TINY_MODEL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "64",
    "--max-position-embeddings",
    "64",
    "--position-embedding-type",
    "rope",
    "--normalization",
    "RMSNorm",
    "--swiglu",
    "--disable-bias-linear",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
]
TINY_TRAINING = [
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "8",
    "--train-iters",
    "20",
    "--lr",
    "1e-3",
    "--min-lr",
    "1e-4",
    "--lr-decay-style",
    "cosine",
    "--lr-warmup-iters",
    "2",
    "--lr-decay-iters",
    "20",
    "--log-interval",
    "1",
    "--eval-iters",
    "1",
    "--eval-interval",
    "1000",
    "--split",
    "90,8,2",
]


@dataclass(frozen=True)
class Run:
    """A finished job.

    Attributes:
        returncode: exit code of torchrun.
        output: standard output and error of all ranks together.
        tensorboard: directory of its event files, if it wrote any.
    """

    returncode: int
    output: str
    tensorboard: Path | None = None

    def scalars(self, tag: str) -> dict[int, float]:
        """Return the logged values by iteration, exactly as the float32 that was logged."""
        assert self.tensorboard is not None
        return read_scalars(self.tensorboard, tag)

    def losses(self) -> dict[int, float]:
        """Return the training loss by iteration, in nats per token."""
        return self.scalars("lm loss")

    def validation_losses(self) -> list[float]:
        """Return the validation losses in the order in which they were printed (7 digits)."""
        found = re.findall(r"on validation set \| lm loss value: (\S+)", self.output)
        return [float(value) for value in found]

    def error_line(self) -> str:
        """Return the last line that starts with ``error:``, or an empty string."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return lines[-1] if lines else ""


def pretrain(
    ranks: int,
    *flags: str | Path,
    entry: Path | None = None,
    tensorboard: Path | None = None,
    timeout: float = 300,
    restarts: int = 0,
    environment: dict[str, str] | None = None,
) -> Run:
    """Run ``pretrain_topk_gpt.py`` (or another `entry`) to its end.

    The script itself runs in forks, which save the imports (`tests.harness.forks`). With another
    entry, restarts, or TOPK_TORCHRUN=1 in the environment, torchrun starts the ranks.

    Args:
        ranks: number of gloo ranks on this machine.
        flags: command-line flags.
        entry: another script that takes the same flags.
        tensorboard: directory to which exact scalars are written.
        timeout: seconds after which the whole job is killed and the test fails.
        restarts: how often our launcher restarts the ranks after a failure.
        environment: variables added to those of this process.
    """
    command = command_line(ranks, *flags, entry=entry, tensorboard=tensorboard, restarts=restarts)
    if entry is None and not restarts and os.environ.get("TOPK_TORCHRUN") != "1":
        place = command.index(str(SCRIPT))
        more: dict[str, Any] = {"preload": "megatron", "ranks": ranks, "timeout": timeout}
        done = run_forked(SCRIPT, *command[place + 1 :], environment=environment, **more)
        return _finished(done.returncode, done.stdout + done.stderr, tensorboard)
    # A file and not a pipe: helper processes of a killed rank would hold a pipe open forever.
    with tempfile.TemporaryFile("w+") as output:
        process = start(command, output, environment)
        try:
            returncode = process.wait(timeout)
        except BaseException:
            kill_job(process.pid)
            raise
        output.seek(0)
        return _finished(returncode, output.read(), tensorboard)


def _finished(returncode: int, output: str, tensorboard: Path | None) -> Run:
    """Return the run; a failed one without Megatron's list of arguments.

    These four hundred lines come before the error, and logs that are cut show nothing else.
    """
    if returncode:
        output = re.sub(r"-+ arguments -+\n.*?-+ end of arguments -+\n", "", output, flags=re.S)
    return Run(returncode, output, tensorboard)


def command_line(
    ranks: int,
    *flags: str | Path,
    entry: Path | None = None,
    tensorboard: Path | None = None,
    restarts: int = 0,
) -> list[str]:
    """Return the torchrun command; torchrun picks a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if restarts:
        launcher[2:3] = ["topk_megatron.train.launch", f"--max-restarts={restarts}"]
    command = [*launcher, f"--nproc-per-node={ranks}", str(entry or SCRIPT), *map(str, flags)]
    if tensorboard is not None:
        command += ["--tensorboard-dir", str(tensorboard), "--tensorboard-log-interval", "1"]
    return command


def start(
    command: list[str], output: IO[str], environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a job whose ranks write to `output`."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def kill_job(launcher: int) -> None:
    """Kill torchrun and every rank with its helpers (-9), as a power cut would.

    torchrun gives each rank its own session. If the caller belongs to the job, it dies last.
    """
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(launcher, signal.SIGKILL)
    for rank in sorted(map(int, children), key=lambda pid: pid == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)
