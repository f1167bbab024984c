"""The table in docs/scaling.md of what makes the host wait names code that Megatron has."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY

PAGE = (REPOSITORY / "docs" / "scaling.md").read_text()
TABLE = PAGE.split("## Flags that make the host wait for the GPU")[1]
PLACES = [
    (file, name)
    for row in TABLE.splitlines()
    if row.startswith("| ") and not row.startswith("| what")
    for file, names in [re.findall(r"^`([\w/]+\.py)`: (.*)", row.split(" | ")[1])[0]]
    for name in re.findall(r"`([^`]+)`", names)
]


def test_the_table_is_found() -> None:
    assert len(PLACES) == 12


@pytest.mark.parametrize(("file", "name"), PLACES, ids=lambda value: value)
def test_megatron_has_what_the_table_names(file: str, name: str) -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    assert name in (Path(spec.origin).parents[1] / file).read_text()


def test_the_flags_are_megatrons() -> None:
    root = importlib.util.find_spec("megatron.core")
    assert root is not None
    assert root.origin is not None
    training = Path(root.origin).parents[1] / "training"
    known = "\n".join(path.read_text() for path in training.rglob("*.py"))
    rows = [row for row in TABLE.splitlines() if row.startswith("| ")]
    flags = {flag for row in rows for flag in re.findall(r"--([a-z0-9-]+)", row)}
    for flag in flags - {"no-check-for-nan-in-loss-and-grad"}:
        assert flag in known or flag.replace("-", "_") in known, flag
    assert "check_for_nan_in_loss_and_grad" in known
