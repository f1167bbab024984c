"""Runs the scripts of examples/slurm on a real two-node Slurm, with a preemption half way.

slurmctld, two slurmd and munged run on loopback. Missing packages are installed if this is root and
there is apt-get; otherwise the tests are skipped and say so.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK, flags  # noqa: F401
from tests.harness.launch import REPOSITORY, pretrain
from topk_megatron.files import read_scalars

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPTS = REPOSITORY / "examples" / "slurm"
STEPS = 12


class Cluster:
    """Commands for the Slurm on loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *options: str | Path, **variables: str) -> str:
        """Submit a job; return its number."""
        return self.run("sbatch", "--parsable", *map(str, options), **variables).strip()

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job)
        return re.findall(r"JobState=(\w+)", shown)[-1]

    def start_now(self, job: str) -> None:
        """Start a requeued job without the two minutes for which Slurm holds it back."""
        for _ in range(100):
            if self.state(job) == "PENDING":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                return
            time.sleep(0.2)  # Slurm is still cleaning up the previous life
        raise AssertionError(f"job {job} was not requeued but is {self.state(job)}")

    def wait(self, job: str, seconds: int, log: Path) -> None:
        """Wait until the job has completed."""
        state = "unknown"
        for _ in range(seconds * 2):
            state = self.state(job)
            if state == "COMPLETED":
                return
            assert state in {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"}, (
                state + log.read_text()[-3000:]
            )
            time.sleep(0.5)
        raise AssertionError(f"job {job} is still {state}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("slurm")
    script = str(REPOSITORY / "scripts" / "slurm_on_loopback.sh")
    if os.geteuid():
        pytest.skip("slurmd starts jobs as their users and needs root")
    if not shutil.which("slurmctld", path="/usr/sbin:" + os.environ["PATH"]) and not shutil.which(
        "apt-get"
    ):
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    done = subprocess.run(
        [script, "start", str(directory)], capture_output=True, text=True, timeout=400
    )
    try:
        if done.returncode == 3:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        yield Cluster(directory)
    finally:
        subprocess.run([script, "stop", str(directory)], timeout=60, check=True)


@pytest.fixture
def job(flags: list[str], dataset: Path, tokenizer: Path, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    """Return the variables that a user sets at the top of the scripts."""
    arguments = [*flags, *TOPK, "--train-iters", str(STEPS)]
    cut = arguments.index("--data-path")
    config = tmp_path / "tiny.args"
    config.write_text("# tiny\n" + "\n".join(arguments[:cut] + arguments[cut + 4 :]) + "\n")
    return {
        "PROJECT": str(REPOSITORY),
        "PYTHON": sys.executable,
        "RUN": str(tmp_path / "run"),
        "DATA": str(dataset),
        "TOKENIZER": str(tokenizer),
        "CONFIG": str(config),
        "RANKS_PER_NODE": "1",
        "SAVE_EVERY": "5",
        "RESTARTS": "0",
        "MORE": "--num-workers 1",  # its worker process gets the signal too
    }


def test_preempted_job_goes_back_to_the_queue_and_ends_with_the_same_losses(
    cluster: Cluster,
    job: dict[str, str],
    flags: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    slow = {"ENTRY": "tests/distributed/faulty_pretrain.py", "TOPK_FAULT_STEP_SECONDS": "0.2"}
    log = tmp_path / "job.log"
    script = SCRIPTS / "many_nodes.sbatch"
    number = cluster.submit("--nodes=2", f"--output={log}", script, **job, **slow)
    wait_for(r"iteration +3/", log)
    # This job outranks the other on both nodes, and soon ends.
    cluster.submit("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1")
    wait_for(r"== job \d+\.0 ended with", log)
    cluster.start_now(number)
    cluster.wait(number, 120, log)

    text = log.read_text()
    lives = re.split(r"== job \d+\.\d+ on .*\n", text)[1:]
    assert len(lives) == 2
    (stopped,) = set(re.findall(r"stopped by a signal after iteration (\d+)", lives[0]))
    assert "ended with 75" in lives[0]
    assert int(stopped) < STEPS
    events = Path(job["RUN"]) / "tensorboard"
    reference = pretrain(2, *flags, *TOPK, "--train-iters", str(STEPS), tensorboard=tmp_path / "tb")
    assert reference.returncode == 0, reference.output
    assert read_scalars(events, "lm loss") == reference.losses()
    first, second = (sorted(set(map(int, re.findall(r"iteration +(\d+)/", t)))) for t in lives)
    assert first == list(range(1, int(stopped) + 1))
    assert second == list(range(int(stopped) + 1, STEPS + 1))
    if keep := os.environ.get("TOPK_KEEP_SLURM_LOG"):
        shutil.copy(log, keep)


def test_sweep_runs_each_line_of_its_file_in_a_folder_of_its_own(
    cluster: Cluster, job: dict[str, str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--topk-k 4 --train-iters 2\n--topk-k 16 --train-iters 2\n")
    log = tmp_path / "sweep-%a.log"
    variables = {**job, "SWEEP": str(sweep), "SWEEP_RUN": job["RUN"]}
    number = cluster.submit("--array=0-1", f"--output={log}", SCRIPTS / "sweep.sbatch", **variables)
    for task, k in enumerate((4, 16)):
        own = tmp_path / f"sweep-{task}.log"
        cluster.wait(f"{number}_{task}", 120, own)
        assert f"k: {k} of 64" in own.read_text()
        assert (Path(job["RUN"]) / str(task) / "iter_0000002" / "metadata.json").exists()


def wait_for(pattern: str, log: Path, seconds: int = 120) -> None:
    for _ in range(seconds * 5):
        if log.exists() and re.search(pattern, log.read_text()):
            return
        time.sleep(0.2)
    raise AssertionError(f"{pattern} never came:\n{log.read_text() if log.exists() else 'no log'}")
