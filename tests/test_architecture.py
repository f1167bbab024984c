"""The imports point one way, and files stay readable."""

import ast
from pathlib import Path

import pytest

from topk_megatron.testing.launch import REPOSITORY

PACKAGE = REPOSITORY / "topk_megatron"
# What each part may import of the others; nothing else.
ALLOWED = {
    "ops": set(),
    "errors": set(),
    "config": {"errors"},
    "schedule": {"config"},
    "exitcodes": set(),
    "cli": {"errors", "exitcodes"},
    "cluster": {"exitcodes"},
    "device": {"errors"},
    "text": {"errors"},
    "checkpoint": {"errors"},
    "parallel": {"config", "errors", "ops", "schedule"},
    "model": {"config", "errors", "ops", "parallel", "schedule"},
    "train": {
        *(
            "checkpoint",
            "config",
            "device",
            "errors",
            "exitcodes",
            "model",
            "ops",
            "parallel",
            "schedule",
            "text",
        )
    },
    "plan": {"config", "device", "errors", "model", "parallel", "train"},
    "hf": {"checkpoint", "config", "errors", "ops", "schedule"},
    "evaluation": {"errors", "hf", "text"},
    "analysis": {"config", "errors", "hf", "ops", "text"},
    "explorer": {"analysis", "cli", "errors", "hf"},
    "testing": {"checkpoint", "cli", "cluster", "config", "device", "hf", "model", "ops", "train"},
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
