"""Checks docs/security.md against the tree: what is unpickled, what is run and what listens."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY

SHIPPED = ("topk_megatron", "tools", "examples", "benchmarks", "docker", "scripts", "contrib")
# The only file that opens foreign pickles, through an allow list of classes.
UNPICKLES = "topk_megatron/checkpoint/pickles.py"
# The files that run the code of an exported folder, in a command whose user names the folder.
RUNS_MODEL_CODE = {"topk_megatron/hf/model.py"}
MODULES_THAT_UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> list[Path]:
    files = [path for part in SHIPPED for path in (REPOSITORY / part).rglob("*.py")]
    return [*files, REPOSITORY / "pretrain_topk_gpt.py", REPOSITORY / "setup.py"]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in a file with its dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """Return a constant keyword's value, None if it is absent, or Ellipsis if it is computed."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None


def test_torch_load_takes_weights_only_everywhere_but_behind_the_allow_list() -> None:
    for path in [*sources(), *(REPOSITORY / "tests").rglob("*.py")]:
        shipped = (REPOSITORY / "tests") not in path.parents
        for name, call in calls(path):
            if name.split(".")[-2:] != ["torch", "load"] or name_of(path) == UNPICKLES:
                continue
            # torch's own default is True since 2.6.
            allowed = {True} if shipped else {True, None}
            assert keyword(call, "weights_only") in allowed, f"{name_of(path)}:{call.lineno}"


def test_only_the_allow_list_opens_pickles() -> None:
    for path in sources():
        if name_of(path) == UNPICKLES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in MODULES_THAT_UNPICKLE, place
            elif isinstance(node, ast.Attribute):
                base = ast.unparse(node.value).split(".")[0]
                # Other files may use only the name of the error from these modules.
                assert base not in MODULES_THAT_UNPICKLE or node.attr == "UnpicklingError", place
                # These calls of torch and Megatron unpickle an index or the objects freely.
                assert node.attr not in ("read_metadata", "load_common_state_dict"), place


def test_megatrons_loader_runs_only_behind_the_check_of_objects() -> None:
    """It unpickles freely, so `open_resume` must check the checkpoint first."""
    calling = {
        name_of(path)
        for path in sources()
        for name, _ in calls(path)
        if name.split(".")[-1] in ("load_checkpoint", "load_tensors_metadata")
    }
    # docs/security.md names DeepSpeed's own loader as trusted.
    assert calling == {"topk_megatron/train/sample.py", "examples/deepspeed/train.py"}
    sample = (REPOSITORY / "topk_megatron" / "train" / "sample.py").read_text()
    assert sample.index("= parse(device") < sample.index("load_checkpoint([model]")
    run = (REPOSITORY / "topk_megatron" / "train" / "main.py").read_text()
    assert run.index("open_resume(early)") < run.index("lambda: pretrain(")
    resume = (REPOSITORY / "topk_megatron" / "train" / "resume.py").read_text()
    assert "check_trust(reader)" in resume.split("def open_resume")[1].split("\ndef ")[0]


def test_numpy_never_unpickles() -> None:
    for path in sources():
        for name, call in calls(path):
            if name.endswith(("np.load", "numpy.load")):
                assert keyword(call, "allow_pickle") in (None, False), name_of(path)


def test_nothing_evaluates_text_or_starts_a_shell() -> None:
    for path in sources():
        for name, call in calls(path):
            place = f"{name_of(path)}:{call.lineno}"
            assert name not in ("eval", "exec", "os.system", "os.popen"), place
            assert keyword(call, "shell") in (None, False), place
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), place


def test_model_code_is_run_only_where_the_documentation_says() -> None:
    pattern = re.compile(r"""trust_remote_code["']?\s*[:=](?!\s*False)""")
    running = {
        name_of(path)
        for path in sources()
        if "hf/modeling" not in name_of(path) and pattern.search(code_of(path))
    }
    assert running == RUNS_MODEL_CODE
    listed = (REPOSITORY / "docs" / "security.md").read_text()
    for name in running:
        assert name in listed, f"docs/security.md does not name {name}"


def code_of(path: Path) -> str:
    """Return a file's text without its multi-line strings (documentation, templates)."""
    return re.sub(r'"""[\s\S]*?"""', "", path.read_text())


def test_nothing_listens_to_other_machines_unless_told_to() -> None:
    everywhere = re.compile(r"0\.0\.0\.0|--bind_all|--bind-all|INADDR_ANY")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout")
    for name in listed:
        path = REPOSITORY / name
        if name == "tests/test_security.py" or path.suffix == ".png" or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            # In a container this is the way in from the host, and published to localhost only.
            inside = "127.0.0.1:8765:8765" in line or "inside the container" in line
            assert inside or not everywhere.search(line), f"{name}:{number}: {line.strip()}"


def test_explorer_and_slurm_on_loopback_listen_on_this_machine() -> None:
    command = (REPOSITORY / "topk_megatron" / "web" / "explorer" / "command.py").read_text()
    assert '"--host", default="127.0.0.1"' in command
    slurm = (REPOSITORY / "scripts" / "slurm_on_loopback.sh").read_text()
    assert "NoCtldInAddrAny,NoInAddrAny" in slurm
    assert re.findall(r"NodeAddr=(\S+)", slurm) == ["127.0.0.1", "127.0.0.1"]


def test_dependencies_are_pinned_to_one_version_each() -> None:
    for name in ("constraints.txt", "constraints-transformers-4.txt"):
        lines = (REPOSITORY / name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins
        for line in pins:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
        assert len({line.split("==")[0].lower() for line in pins}) == len(pins)
