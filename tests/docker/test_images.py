"""Tests the Dockerfile and the programs of its images; needs no container engine.

With TOPK_TEST_CHROOT=1, a test runs the steps of the analysis image in a chroot, which takes
minutes and downloads gigabytes.
"""

import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.launch import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
TARGETS = ("training", "analysis")


def load(path: str) -> Any:
    """Import a script as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chroot() -> Any:
    load("contrib/dockerfile.py")  # the other script imports it
    return load("contrib/run_stage_in_chroot.py")


@pytest.fixture(scope="module")
def stages(chroot: Any) -> dict[str, Any]:
    return chroot.parse(DOCKERFILE.read_text())


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=Path(sys.executable).parent
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_user_and_have_a_health_check(target: str, stages: dict[str, Any]) -> None:
    last = dict(stages[target].steps)  # the last of each keyword
    assert last["USER"] not in ("root", "0")
    assert "docker/health.py" in last["HEALTHCHECK"]
    assert "ENTRYPOINT" in last
    after_user = [keyword for keyword, _ in stages[target].steps]
    assert "RUN" not in after_user[after_user.index("USER") :]


def test_bases_are_pinned_and_no_package_index_is_named(stages: dict[str, Any]) -> None:
    for stage in stages.values():
        assert ":" in stage.base
        assert "latest" not in stage.base
    text = DOCKERFILE.read_text()
    assert "://" not in text
    assert "--index-url" not in text


def test_everything_copied_from_the_checkout_is_in_the_context(
    stages: dict[str, Any], chroot: Any
) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for stage in stages.values():
        for keyword, value in stage.steps:
            if keyword == "COPY" and not value.startswith("--from"):
                for source in value.split()[:-1]:
                    assert (REPOSITORY / source).exists(), source
                    assert source == "." or not chroot.ignored(source, patterns), source
    for path in ("tests/rows.py", ".git/config", "runs/a/b", "topk_megatron/ops/x.so", ".venv/x"):
        assert chroot.ignored(path, patterns), path


def test_extras_that_images_install_exist(stages: dict[str, Any]) -> None:
    script = load("docker/requirements.py")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = []
    for stage in stages.values():
        for keyword, value in stage.steps:
            if keyword == "RUN" and "requirements.py" in value:
                words = value.split("requirements.py")[1].split()
                asked.append([word for word in words[: words.index("--into")] if word[0] != "-"])
    assert len(asked) == 2
    for words in asked:
        extras = [word for word in words if word in project["optional-dependencies"]]
        others = set(words) - set(extras)
        assert others <= {"torch", "numpy"}, others
        assert script.requirements(project, extras)


def test_extras_of_extras_are_resolved_once() -> None:
    script = load("docker/requirements.py")
    project = {
        "name": "thing",
        "dependencies": ["torch>=2"],
        "optional-dependencies": {"a": ["x>=1", "y"], "b": ["thing[a]", "z"], "c": ["thing[a, b]"]},
    }
    assert script.requirements(project, ["b"]) == ["torch>=2", "z", "x>=1", "y"]
    assert sorted(script.requirements(project, ["c", "a"])) == ["torch>=2", "x>=1", "y", "z"]
    with pytest.raises(SystemExit, match="no extra 'd'; there are a, b, c"):
        script.requirements(project, ["d"])


def test_kept_packages_stay_at_their_installed_versions() -> None:
    script = load("docker/requirements.py")
    pins = [
        "# a comment",
        "torch==1.0",
        "nvidia-cublas==1",
        "cuda-toolkit==2",
        "pytest==0.1",
        "x==3",
    ]
    assert script.constraints(pins, []) == pins[1:]
    kept = script.constraints(pins, ["torch", "pytest"])
    assert kept[0] == "x==3"
    assert {line.split("==")[0] for line in kept} == {"x", "torch", "pytest"}
    assert f"pytest=={pytest.__version__}" in kept
    with pytest.raises(SystemExit, match="not installed here"):
        script.constraints(pins, ["no-such-package"])


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (["--standalone", "a.py"], "-m topk_megatron.train.launch --standalone a.py"),
        (["python", "tools/x.py", "a b"], "tools/x.py a b"),
        ([], "-m topk_megatron.train.launch --help"),
    ],
)
def test_entry_point_starts_the_launcher_or_a_program(
    arguments: list[str], started: str, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    entry = REPOSITORY / "docker" / "entrypoint.sh"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([entry, *arguments], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == started


def test_health_reports_kernels_that_are_missing_or_damaged(tmp_path: Path) -> None:
    health = load("docker/health.py")
    assert "no compiled operator" in health.library_problem(tmp_path)
    library = tmp_path / "_topk_mask_cpu.so"
    library.write_bytes(b"\x7fELF and more")
    assert health.library_problem(tmp_path) is None
    library.write_bytes(b"")
    assert "is damaged" in health.library_problem(tmp_path)
    (tmp_path / "_build_error_cuda.txt").write_text("no nvcc")
    assert "cuda kernel was not built" in health.library_problem(tmp_path)


def test_health_reports_a_driver_that_fails_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = load("docker/health.py")
    monkeypatch.setattr(health, "SECONDS", 0.5)
    command = tmp_path / "smi"
    command.write_text("#!/bin/sh\nexec sleep 30\n")
    command.chmod(0o755)
    assert health.gpu_problem(tmp_path, str(command)) is None  # no GPU here
    (tmp_path / "nvidia0").touch()
    assert "does not answer" in health.gpu_problem(tmp_path, str(command))
    command.write_text("#!/bin/sh\necho lost\nexit 15\n")
    assert health.gpu_problem(tmp_path, str(command)) == "the GPU driver says: lost"
    command.write_text("#!/bin/sh\necho GPU 0\n")
    assert health.gpu_problem(tmp_path, str(command)) is None
    assert "does not answer" in health.gpu_problem(tmp_path, str(tmp_path / "none"))


@pytest.fixture
def server() -> Iterator[tuple[http.server.HTTPServer, list[int]]]:
    """Start a server on localhost; its answers have the status in the list."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    made = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made, status
    made.shutdown()
    made.server_close()


def test_health_reports_an_explorer_that_does_not_answer(
    server: tuple[http.server.HTTPServer, list[int]],
) -> None:
    health = load("docker/health.py")
    explorer, status = server
    port = explorer.server_address[1]
    assert health.explorer_problem(port) is None
    status[0] = 500
    assert "does not answer" in health.explorer_problem(port)
    explorer.shutdown()
    explorer.server_close()
    assert health.explorer_problem(port) is None


def test_nothing_of_the_host_but_the_pip_cache_is_writable_in_the_chroot(
    chroot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = chroot.Root(tmp_path / "root", {})
    for caches in (None, [], ["/root/.cache/pip"]):
        lines = chroot.mounts(root, caches)
        bound = [line.split()[2] for line in lines if "bind" in line]
        devices = [f"/dev/{name}" for name in chroot.DEVICES]
        assert bound == devices + [str(tmp_path / "home/.cache/pip")] * len(caches or [])
        assert all(line.split()[1:3] in (["-t", "proc"], ["-t", "tmpfs"]) or "bind" in line
                   for line in lines if line.startswith("mount"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    not os.environ.get("TOPK_TEST_CHROOT"), reason="minutes; TOPK_TEST_CHROOT=1 asks for it"
)
def test_steps_of_the_analysis_image_run_in_a_chroot(tmp_path: Path) -> None:
    script = REPOSITORY / "contrib" / "run_stage_in_chroot.py"
    code = "import torch, topk_megatron.ops as ops; print(ops.topk_mask(torch.arange(4.0), 1))"
    command = [str(script), "analysis", str(tmp_path / "roots"), "--", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "HEALTHCHECK: healthy" in done.stdout
    assert "tensor([0., 0., 0., 3.])" in done.stdout
