"""Data and user mistakes of examples/deepspeed, tested in this process without DeepSpeed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.conftest import flags


def fails(example: Any, capsys: Any, monkeypatch: Any, *arguments: str) -> str:
    """Run the command, which must fail, and return its one line of error output."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    for name, value in example.ALONE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n\n{"txt": "b"}\n', "line 3: no key 'text'"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: no key 'completion'"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2: key 'text' holds int, not text"),
        ('{"body": "a"}\n', 'line 1: expected the key "text", or "prompt" and "completion"'),
        ("[1]\n", "line 1: expected a JSON object, found list"),
        ("{\n", "line 1: not JSON"),
        ("", "no lines"),
        ('{"text": "a"}\n', "fewer than one sequence of 48"),
        (json.dumps({"prompt": "a" * 900, "completion": "b"}), "none of 1 examples has at most 48"),
    ],
)
def test_bad_data_ends_in_one_line_with_its_place(
    lines: str, message: str, example: Any, folder: Path, tmp_path: Path, capsys: Any,
    monkeypatch: Any,
) -> None:  # fmt: skip
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    line = fails(example, capsys, monkeypatch, *flags(folder, path, "zero1", tmp_path / "run"))
    assert line.startswith("error: ")
    assert message in line


def test_other_mistakes_end_in_one_line(
    example: Any, folder: Path, data: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def line(model: Path, config: str = "zero1", *more: str) -> str:
        arguments = flags(model, data["text"], config, tmp_path / "run", *more)
        return fails(example, capsys, monkeypatch, *arguments)

    llama = tmp_path / "llama"
    llama.mkdir()
    assert "has no config.json" in line(llama)
    (llama / "config.json").write_text('{"model_type": "llama"}')
    assert "is not a TopK LM folder: its model_type is 'llama'" in line(llama)
    assert "cannot be read" in line(folder, "zero9")
    assert "--seq-length must be in [2, 64], got 65" in line(folder, "zero1", "--seq-length", "65")
    experts = json.loads((folder / "config.json").read_text())
    experts.update(num_experts=2, num_experts_per_tok=1, moe_layers=[1])
    (llama / "config.json").write_text(json.dumps(experts))
    assert "has experts, which this example does not train" in line(llama)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "DeepSpeed cannot be imported" in line(folder)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_0000003")
    (tmp_path / "run" / "run.json").write_text('{"ranks": 2}')
    assert "belongs to a run with ranks=2, but this run has 1" in line(folder)
    (tmp_path / "run" / "hf").mkdir()
    assert "already exists: this run is finished" in line(folder)


def test_batch_size_that_ranks_cannot_share_ends_in_one_line(
    example: Any, folder: Path, data: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(example.ALONE, "WORLD_SIZE", "3")
    arguments = flags(folder, data["text"], "zero1", tmp_path / "run")
    said = fails(example, capsys, monkeypatch, *arguments)
    assert "must be a multiple of train_micro_batch_size_per_gpu=2 times 3 ranks" in said


def test_only_completions_are_targets_and_order_depends_on_seed_and_step_alone(
    example: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [("ab", "cd"), ("", "xyz"), ("abcdefg", "h"), ("q", "r")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    sequences, said = example.read_sequences([str(path)], encode, 1, 8)
    assert said == "3 examples, 8 tokens to learn; 1 longer than 8 tokens left out"
    batches = example.Batches(sequences, 2, 7, 0)
    seen = []
    for step in range(6):
        batch = batches.step(step)
        assert batch == example.Batches(sequences, 2, 7, 0).step(step)
        seen += batch
        got = batches.collate(batch)
        for row, sequence in enumerate(batch):
            read, learned = sequence.tokens.tolist(), sequence.tokens.tolist()[sequence.context :]
            kept = got.mask[row].bool()
            assert got.tokens[row][kept].tolist() == read
            places = (got.targets[row] != -100).nonzero().flatten().tolist()
            assert got.targets[row][places].tolist() == learned[-sequence.num_targets :]
            assert all(read[place + 1] == got.targets[row][place] for place in places)
    for epoch in range(4):
        part = [sequence.tokens.tolist() for sequence in seen[3 * epoch : 3 * epoch + 3]]
        assert sorted(part) == sorted(sequence.tokens.tolist() for sequence in sequences)


def test_text_is_packed_with_an_end_after_each_document(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "defgh"}\n')
    sequences, said = example.read_sequences([str(path)], lambda t: list(map(ord, t)), 1, 4)
    stream = [*map(ord, "abc"), 1, *map(ord, "defgh"), 1]
    assert [list(s.tokens) for s in sequences] == [stream[:4], stream[4:8]]
    assert said == "2 documents, 10 tokens, 2 sequences of 4"
