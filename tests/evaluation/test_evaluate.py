"""tools/evaluate.py as a user runs it, offline, and what it says to wrong input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import run_tool
from tests.harness.launch import REPOSITORY
from topk_megatron.evaluation.tasks import read_task
from topk_megatron.hf.model import OpenModel, open_model

TASKS = REPOSITORY / "examples" / "quickstart" / "tasks"

pytestmark = pytest.mark.slow


def log_likelihood(opened: OpenModel, context: str, choice: str) -> float:
    """Of a choice after a context, token by token, as lm-eval cuts them."""
    bare = context.rstrip()
    whole = opened.encode(context + choice)
    cut = max(0, len(whole) - opened.max_length - 1)  # what the model can read
    start = len(opened.encode(bare)) - cut
    whole = whole[cut:]
    with torch.no_grad():
        logits = opened.model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(start, len(whole)))


def test_both_models_are_measured_and_accuracies_equal_a_count_by_hand(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    limit = 12
    done = run_tool(
        "evaluate.py",
        *("--model", folders["default"], folders["dense"], "--text", corpus / "000.txt"),
        *("--tasks", TASKS / "next_speaker.yaml", "--limit", str(limit)),
        *("--output", tmp_path / "results.json"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["topk"] is None for result in results] == [False, True]
    assert len(done.stdout.splitlines()) == 3
    assert done.stdout.splitlines()[2].split()[1] == "dense"

    opened = open_model(folders["default"], dtype="float32", device="cpu")
    lines = (TASKS / "next_speaker.jsonl").read_text().splitlines()[:limit]
    right = 0
    for example in map(json.loads, lines):
        values = [log_likelihood(opened, example["context"], c) for c in example["choices"]]
        right += values.index(max(values)) == example["answer"]
    metrics = results[0]["tasks"]["quickstart_next_speaker"]
    assert metrics["acc"] == pytest.approx(right / limit)
    assert metrics["examples"] == limit


@pytest.mark.parametrize("name", ["next_line", "next_speaker"])
def test_task_files_hold_fair_questions(name: str) -> None:
    task = read_task(TASKS / f"{name}.yaml")
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    examples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(examples) == 120
    answers = [example["answer"] for example in examples]
    assert all(answers.count(n) == 30 for n in range(4))
    for example in examples:
        assert len(set(example["choices"])) == 4
        if name == "next_line":
            assert example["choices"][example["answer"]] not in example["context"]


def without_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("token*"), *folder.glob("special*")):
        file.unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_topk(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["topk"]
    (folder / "config.json").write_text(json.dumps(config))


def of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "qk_norm": True}))


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 97}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_tokenizer, "cannot load the tokenizer"),
        (truncated, "cannot load the model"),
        (without_topk, "topk must have exactly the keys"),
        (of_another_model, "do not fit its config.json: missing: model.layers.0.self_attn.k_norm"),
        (of_another_size, "cannot load the model"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    damage: Callable[[Path], None], complaint: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["default"], folder)
    damage(folder)
    done = run_tool("evaluate.py", "--model", folder, "--text", REPOSITORY / "README.md")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tasks", "/no/such.yaml"], "there is no task file /no/such.yaml"),
        (["--tasks", "constraints.txt.yaml"], "there is no task file"),
        (["--text", "/no/such.txt"], "no file matches"),
        (["--text", "LICENSE"], "file type (none) is not known"),
        (
            ["--text", "README.md", "--output", "/no/such/folder/x.json"],
            "the folder does not exist",
        ),
        (["--text", "README.md", "--device", "cuda"], "this machine has no CUDA; use cpu"),
        (["--text", "README.md", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--text", "README.md", "--context", "100"], "--context must be in [1, 64]"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(
    flags: list[str], complaint: str, folders: dict[str, Path]
) -> None:
    done = run_tool("evaluate.py", "--model", folders["default"], *flags)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def task_with(tmp_path: Path, **changes: object) -> Path:
    """A task file of one question."""
    (tmp_path / "one.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    task = {
        "task": "one",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "one.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    path = tmp_path / "one.yaml"
    path.write_text(json.dumps({**task, **changes}))  # JSON is YAML
    return path


def hostile_metric(tmp_path: Path) -> str:
    """A metric of the library `evaluate`: a Python file, which loading would run."""
    script = tmp_path / "metric.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return str(script)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("doc_to_text", "lm-evaluation-harness refuses: access to attribute '__init__'"),
        ("doc_to_target", "lm-evaluation-harness refuses: access to attribute '__init__'"),
        ("metric_list", "is not one of lm-evaluation-harness's own"),
        ("include", "include is not supported"),
    ],
)
def test_a_task_file_runs_no_code(
    entry: str, complaint: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    template = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % marker  # noqa: UP031
    values: dict[str, object] = {
        "doc_to_text": template,
        "doc_to_target": template,
        "metric_list": [{"metric": hostile_metric(tmp_path)}],
        "include": "other.yaml",
    }
    path = task_with(tmp_path, **{entry: values[entry]})
    done = run_tool("evaluate.py", "--model", folders["default"], "--tasks", path)
    assert not marker.exists()
    assert done.returncode == 2, done.stderr[-2000:]
    assert complaint in done.stderr.splitlines()[-1]


def test_the_same_task_without_code_is_measured(folders: dict[str, Path], tmp_path: Path) -> None:
    path = task_with(tmp_path)
    done = run_tool("evaluate.py", "--model", folders["default"], "--tasks", path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "one (acc)" in done.stdout
