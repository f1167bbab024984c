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


FOREIGN = ("megatron", "torch")


def foreign_names(tree: ast.Module) -> set[str]:
    """Names of a file that are bound to modules or classes of Megatron or torch."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in FOREIGN:
                    found.add((alias.asname or alias.name).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):  # module: Any = training
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value.id in found:
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def base_name(node: ast.expr) -> str:
    """``a`` of ``a.b.c``, ``vars(a)`` and ``a.b[c]``."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) == "vars":
            node = node.args[0]
        else:
            return ""
    return node.id


def patches(source: str) -> list[int]:
    """Lines that assign to something of Megatron or torch."""
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    lines: list[int] = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            lines += [node.lineno] if base_name(node.args[0]) in foreign else []
        lines += [
            target.lineno
            for target in targets
            if not isinstance(target, ast.Name) and base_name(target) in foreign
        ]
    return lines


def test_only_compat_changes_megatron_and_torch() -> None:
    folders = [PACKAGE, REPOSITORY / "tools", REPOSITORY / "examples", REPOSITORY / "docker"]
    for path in [*(p for f in folders for p in f.rglob("*.py")), REPOSITORY / "setup.py"]:
        if PACKAGE / "compat" not in path.parents:
            assert patches(path.read_text()) == [], path


@pytest.mark.parametrize(
    "line",
    [
        "training.save = 1",
        "module.save = 1",
        'setattr(training, "save", 1)',
        'vars(training)["save"] = 1',
        "torch.cuda.is_available = 1",
        "Tensor.to = 1",
    ],
)
def test_a_change_outside_compat_would_be_found(line: str) -> None:
    source = "import torch\nfrom torch import Tensor\nfrom megatron.training import training\n"
    assert patches(source + "module = training\n" + line) == [5]
    assert patches(source + "x = torch.ones(1)\nx.grad = None\nother.save = 1") == []
