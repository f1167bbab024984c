"""A fault in a running job costs only the steps since the last checkpoint.

Each job has two data-parallel ranks and saves every five steps. A job that continues after a fault
is compared bitwise with one that met none.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness.launch import Run, kill_job, pretrain, start
from topk_megatron.checkpoint.directory import TRACKER, is_complete
from topk_megatron.errors import REQUEUE

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FAULTY = Path(__file__).with_name("faulty_pretrain.py")
STEPS = 12


def saving(directory: Path) -> list[str]:
    where = ["--save", str(directory), "--load", str(directory), "--save-interval", "5"]
    return [*where, "--train-iters", str(STEPS)]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The job that met no fault, and its checkpoints of iterations 5, 10 and 12."""
    directory = tmp_path_factory.mktemp("whole")
    settings = [*flags, *TOPK, *saving(directory / "checkpoint"), "--verify-integrity"]
    run = pretrain(2, *settings, tensorboard=directory / "events")
    assert run.returncode == 0, run.output
    return run, directory / "checkpoint"


@pytest.fixture(scope="module")
def undisturbed(whole: tuple[Run, Path]) -> dict[int, float]:
    """Losses of the job that met no fault."""
    return whole[0].losses()


def faulty(fault: str, flags: list[str], directory: Path, *more: str, restarts: int = 0) -> Run:
    """Run a job of two ranks under torchrun that meets `fault`."""
    return pretrain(
        2,
        *[*flags, *TOPK, *saving(directory), *more],
        entry=FAULTY,
        tensorboard=directory.parent / "events",
        restarts=restarts,
        environment={"TOPK_FAULT": fault},
    )


def test_killed_rank_is_restarted_and_the_job_ends_as_if_nothing_had_happened(
    flags: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run = faulty("1:8:kill", flags, tmp_path / "checkpoint", restarts=1)
    assert run.returncode == 0, run.output
    assert "exitcode: -9" in run.output or "exitcode=-9" in run.output or "Signal 9" in run.output
    # Steps 6 and 7 ran twice; the later event of a step counts.
    assert run.losses() == undisturbed
    assert (tmp_path / "checkpoint" / TRACKER).read_text() == str(STEPS)


def test_signal_to_one_rank_saves_at_that_step_and_the_next_job_continues(
    flags: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    stopped = launch(flags, directory, fault="1:7:signal")
    assert stopped.returncode == REQUEUE, stopped.output
    assert f"stopped by a signal after iteration 7, saved in {directory}" in stopped.output
    assert is_complete(directory / "iter_0000007")
    resumed = pretrain(2, *flags, *TOPK, *saving(directory), tensorboard=tmp_path / "resumed")
    assert resumed.returncode == 0, resumed.output
    assert resumed.losses() == {n: loss for n, loss in undisturbed.items() if n > 7}


def test_signal_to_the_launcher_exits_with_the_code_that_slurm_requeues_on(
    flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    stopped = launch(flags, directory, signal_after=r"iteration +2/", pause="0.2")
    assert stopped.returncode == REQUEUE, stopped.output
    (iteration,) = re.findall(r"stopped by a signal after iteration (\d+)", stopped.output)
    assert int(iteration) < STEPS
    assert (directory / TRACKER).read_text() == iteration


def launch(
    flags: list[str], directory: Path, *, fault: str = "", signal_after: str = "", pause: str = "0"
) -> Run:
    """Run a job under our launcher, which gets SIGTERM as soon as its output matches."""
    launcher = [sys.executable, "-m", "topk_megatron.train.launch", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", str(FAULTY), *flags, *TOPK, *saving(directory)]
    environment = {"TOPK_FAULT_STEP_SECONDS": pause}
    if fault:
        environment["TOPK_FAULT"] = fault
    log = directory.parent / "launch.log"
    with log.open("w") as output:
        process = start(command, output, environment)
        try:
            if signal_after:
                wait_for(signal_after, log, process)
                process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        except BaseException:
            kill_job(process.pid)
            raise
    return Run(code, log.read_text())


def wait_for(pattern: str, log: Path, process: "subprocess.Popen[str]") -> None:
    for _ in range(600):
        if re.search(pattern, log.read_text()):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{pattern} never came:\n{log.read_text()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints of about 2 MB each."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "topk-test", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


SMALL_DISK = "3500k"


def test_full_disk_during_a_save_is_one_line_and_the_previous_save_counts(
    flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    directory = small_disk / "checkpoint"
    run = faulty("-1:0:none", flags, directory, "--tensorboard-dir", str(tmp_path / "full"))
    assert run.returncode != 0
    assert "could not write the checkpoint of iteration 10 to" in run.error_line(), run.output
    assert "no space left on device" in run.error_line()
    assert "the last complete one is iteration 5" in run.error_line()
    assert (directory / TRACKER).read_text() == "5"


def test_damaged_latest_checkpoint_costs_the_steps_since_the_previous_one(
    flags: list[str], whole: tuple[Run, Path], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(whole[1], directory)
    (directory / TRACKER).write_text("10")
    data = max((directory / "iter_0000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1  # one bit, which only the hash reveals
    data.write_bytes(changed)
    settings = [*flags, *TOPK, *saving(directory), "--verify-integrity"]
    resumed = pretrain(2, *settings, tensorboard=tmp_path / "resumed")
    assert resumed.returncode == 0, resumed.output
    assert "names iteration 10, which is damaged" in resumed.output
    assert "resuming from 5" in resumed.output
    assert resumed.losses() == {n: loss for n, loss in undisturbed.items() if n > 5}


def test_nan_in_the_loss_of_one_rank_stops_with_rank_and_iteration(
    flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    run = faulty("1:7:nan", flags, directory)
    assert run.returncode != 0
    assert "iteration 7: the loss of rank 1 " in run.error_line(), run.output
    assert "is NaN" in run.error_line()
    assert run.losses().keys() == set(range(1, 7))
    assert (directory / TRACKER).read_text() == "5"
