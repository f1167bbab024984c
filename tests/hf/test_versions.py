"""The same model under transformers 4.57 and 5: the tests again, and equal continuations."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness.launch import REPOSITORY
from tests.hf.models import FAMILIES, make_model, make_tokens

OLDER = REPOSITORY / ".venv" / "transformers-4"

pytestmark = pytest.mark.slow


def run_older(*command: str | Path) -> None:
    assert (OLDER / "transformers").is_dir(), "scripts/setup.sh puts transformers 4.57 there"
    path = os.pathsep.join([str(OLDER), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_all_of_it_holds_in_transformers_4() -> None:
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("model", "interventions")]
    run_older("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a family: the model, tokens, and what transformers 4.57 made of both."""
    directory = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_model(family).save_pretrained(directory / family / "model")
        torch.save(make_tokens(2, 12), directory / family / "tokens.pt")
    run_older(Path(__file__).with_name("older_versions.py"), directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_equal_in_both_and_each_opens_what_the_other_saved(
    family: str, continued: Path
) -> None:
    expected = torch.load(continued / family / "greedy.pt", weights_only=True)
    assert expected.shape == (2, 76)
    tokens = make_tokens(2, 12)
    for name in ("model", "model-from-4"):
        path = continued / family / name
        model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        greedy = model.generate(tokens, max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert torch.equal(greedy, expected), name
