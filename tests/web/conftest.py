"""A running explorer over a tiny random model and an invented study of it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.conftest import HIDDEN, VOCAB, make_model, make_tokenizer
from tests.web.studies import Invention
from topk_megatron.hf.model import OpenModel, open_model
from topk_megatron.web.explorer.app import make_app
from topk_megatron.web.explorer.engine import Engine, open_engine

HOSTILE = "<script>window.hacked=1</script>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """A TopK LM with H = 32 and k = 4 at layers 0 and 1 of 3; one of its tokens is markup."""
    path = make_model(tmp_path_factory.mktemp("model"), layers=(0, 1), seed=4, iteration=200)
    words = [f"word{number}" for number in range(3, VOCAB)]
    make_tokenizer(path, ["<unk>", "</s>", HOSTILE, *words])
    return open_model(path)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, folder: OpenModel) -> Path:
    """A study with cards for layer 0 of that model."""
    path = tmp_path_factory.mktemp("study")
    invention = Invention(path, layers=1, width=HIDDEN, vocab=VOCAB, model=folder.path)
    invention.record().entropy().steer()
    manifest = path / "runs" / "topk" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["model"]["fingerprint"] = folder.fingerprint()
    manifest.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def engine(folder: OpenModel, study: Path) -> Engine:
    """The engine of that model, with that study."""
    return open_engine(folder, study, None)


@pytest.fixture(scope="session")
def client(engine: Engine) -> Any:
    """Asks the explorer without a network."""
    from starlette.testclient import TestClient

    return TestClient(make_app(engine), base_url="http://127.0.0.1:8765")


@pytest.fixture(scope="session")
def address(engine: Engine) -> Iterator[str]:
    """The address at which the explorer is served."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = uvicorn.Config(make_app(engine), host="127.0.0.1", port=port, log_level="warning")
    server: Any = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)
