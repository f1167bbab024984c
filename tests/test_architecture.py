"""The imports point one way, and files stay readable."""

import ast
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY

PACKAGE = REPOSITORY / "topk_megatron"
# What each part may import of the others; nothing else.
ALLOWED = {
    "ops": set(),
    "errors": set(),
    "files": {"errors"},
    "cli": {"errors"},
    "config": {"errors"},
    "compat": {"errors"},
    "text": {"errors", "files"},
    "checkpoint": {"errors", "files"},
    "parallel": {"config", "errors", "ops"},
    "model": {"config", "errors", "ops", "parallel"},
    "train": {
        *("checkpoint", "compat", "config", "errors", "files", "model", "ops", "parallel", "text")
    },
    "plan": {"checkpoint", "compat", "config", "errors", "model", "parallel", "train"},
    "hf": {"checkpoint", "config", "errors", "files", "ops"},
    "evaluation": {"errors", "files", "hf", "text"},
    "analysis": {"config", "errors", "files", "hf", "ops", "text"},
    "web": {"analysis", "cli", "errors", "files", "hf"},
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("topk_megatron.")}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else []
    files += list((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= ALLOWED[part] | {part}, path


def test_every_part_is_listed() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert parts == set(ALLOWED)
