"""Whom the explorer answers, and where it listens."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.hf.model import OpenModel
from topk_megatron.web.explorer.parsing import MAX_BODY
from topk_megatron.web.explorer.security import host_name

_LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp


def test_requests_from_elsewhere_are_refused(client: Any) -> None:
    ask = {"prompt": "word5 word9"}
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "a@127.0.0.1", ""):
        assert client.get("/", headers={"Host": host}).status_code == 421
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        answer = client.post("/api/read", json=ask, headers={"Origin": origin})
        assert answer.status_code == 403
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert client.post("/api/read", json=ask, headers=cross).status_code == 403
    plain = {"Content-Type": "text/plain"}
    assert client.post("/api/read", content="{}", headers=plain).status_code == 415
    long = {"prompt": "x" * MAX_BODY}
    assert client.post("/api/read", json=long).status_code == 413
    same = {"Origin": "http://127.0.0.1:8765"}
    assert client.post("/api/read", json=ask, headers=same).status_code == 200


def test_host_names_are_read_without_their_ports() -> None:
    assert host_name("localhost:80") == "localhost"
    assert host_name("[::1]:80") == "::1"
    assert host_name("127.0.0.1:x") is None
    assert host_name("127.0.0.1/evil") is None


def test_only_the_pages_own_files_are_served(client: Any) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/static/dom.js").headers["content-type"].startswith("text/javascript")
    for path in ("engine.py", "..%2fengine.py", "%2e%2e/engine.py", "../engine.py"):
        assert client.get(f"/static/{path}").status_code == 404


@pytest.fixture
def explorer(folder: OpenModel, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """The process and the port of tools/explorer.py, started as a user does and answering."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tool = REPOSITORY / "tools" / "explorer.py"
    command = [sys.executable, str(tool), "--model", str(folder.path), "--port", str(port)]
    # Its own cache: other processes may be writing the shared one.
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    log = tmp_path / "explorer.log"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream
        ) as process,
    ):
        try:
            _wait_for_answer(process, f"http://127.0.0.1:{port}/api/model", log)
            yield process.pid, port
        finally:
            process.terminate()


def _wait_for_answer(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, f"the explorer ended:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answered at {url}:\n{log.read_text()}")


def listening(pid: int) -> set[str]:
    """Local addresses ("0100007F:1F90") on which a process and its children listen for TCP."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    inodes = set()
    for name in (str(pid), *children):
        for descriptor in Path(f"/proc/{name}/fd").iterdir():
            # The connection that was answered may be closed in the meantime.
            with suppress(FileNotFoundError):
                inodes.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            local, state, inode = fields[1], fields[3], fields[9]
            if state == _LISTENS and f"socket:[{inode}]" in inodes:
                found.add(local)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc/net/tcp")
def test_real_explorer_listens_on_127_0_0_1_only(explorer: tuple[int, int]) -> None:
    process, port = explorer
    loopback = int.from_bytes(socket.inet_aton("127.0.0.1"), sys.byteorder)
    assert listening(process) == {f"{loopback:08X}:{port:04X}"}
