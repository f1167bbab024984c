"""What the explorer answers, checked against the model itself, and which requests it refuses."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.analysis.conftest import make_model
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel, open_model
from topk_megatron.web.explorer.command import main
from topk_megatron.web.explorer.engine import Engine, open_engine
from topk_megatron.web.explorer.parsing import MAX_CHARACTERS

PROMPT = "word5 word9 word70 word9"
STEER = {
    "prompt": PROMPT, "layer": 1, "neuron": 7, "op": "add", "value": 3.0, "new_tokens": 6,
    "temperature": 0.0, "seed": 0,
}  # fmt: skip


def ids(folder: OpenModel) -> torch.Tensor:
    return folder.tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def test_reading_shows_the_strongest_neurons_of_the_sparse_state(
    client: Any, folder: OpenModel
) -> None:
    answer = client.post("/api/read", json={"prompt": PROMPT}).json()
    assert answer["tokens"] == ids(folder)[0].tolist()
    hidden = folder.model(ids(folder), output_hidden_states=True).hidden_states
    for layer in (0, 1):
        for place, row in enumerate(hidden[layer + 1][0]):
            found = answer["layers"][str(layer)][place]
            assert {neuron for neuron, _ in found} == set(row.nonzero().flatten().tolist())
            for neuron, value in found:
                assert value == pytest.approx(row[neuron].item(), abs=1e-4)
            assert [abs(v) for _, v in found] == sorted((abs(v) for _, v in found), reverse=True)


def test_neuron_has_its_values_and_its_card_of_the_study(client: Any, folder: OpenModel) -> None:
    answer = client.post("/api/neuron", json={"prompt": PROMPT, "layer": 0, "neuron": 3}).json()
    hidden = folder.model(ids(folder), output_hidden_states=True).hidden_states[1][0, :, 3]
    torch.testing.assert_close(torch.tensor(answer["values"]), hidden)
    assert len(answer["card"]["examples"]) == 8
    weights = folder.model.lm_head.weight * folder.model.model.norm.weight
    assert answer["promoted"][0][0] == weights[:, 3].argmax().item()
    assert answer["suppressed"][0][0] == weights[:, 3].argmin().item()
    other = client.post("/api/neuron", json={"prompt": PROMPT, "layer": 1, "neuron": 3}).json()
    assert other["card"] is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steering_equals_the_models_own_intervention(
    client: Any, folder: OpenModel, temperature: float
) -> None:
    from topk_megatron.hf.modeling.modeling_topk import Intervention

    request = {**STEER, "temperature": temperature}
    answer = client.post("/api/steer", json=request).json()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": temperature > 0, "top_k": 0}
    options["attention_mask"] = torch.ones_like(ids(folder))
    torch.manual_seed(0)
    plain = folder.model.generate(ids(folder), **options)[0, 4:].tolist()
    torch.manual_seed(0)
    with folder.model.intervene(Intervention(layer=1, neuron=7, op="add", value=3.0)):
        steered = folder.model.generate(ids(folder), **options)[0, 4:].tolist()
    assert answer["unsteered"]["tokens"] == plain
    assert answer["steered"]["tokens"] == steered


def test_steering_by_nothing_changes_nothing(client: Any) -> None:
    answer = client.post("/api/steer", json={**STEER, "value": 0.0}).json()
    assert answer["steered"] == answer["unsteered"]


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("read", {"prompt": "  "}, "type a prompt first"),
        ("read", {"prompt": 5}, "type a prompt first"),
        ("read", {"prompt": "\ud800"}, "half a character (a lone surrogate)"),
        ("read", {"prompt": "x" * (MAX_CHARACTERS + 1)}, "at most 4,000 are read"),
        ("read", {"prompt": "word5 " * 40}, "has 40 tokens; 1 to 31 can be read"),
        ("neuron", {"layer": 2}, "layer 2 has no TopK; the layers that have one are 0, 1"),
        ("neuron", {"layer": 3}, "layer must be a whole number from 0 to 2, got 3"),
        ("neuron", {"neuron": 32}, "neuron must be a whole number from 0 to 31, got 32"),
        ("neuron", {"neuron": -1}, "from 0 to 31"),
        ("neuron", {"neuron": True}, "from 0 to 31"),
        ("steer", {"op": "__class__"}, "op must be one of add, set, scale"),
        ("steer", {"value": "3"}, "value must be a number"),
        ("steer", {"value": 1e9}, "value must be a number from -10000 to 10000"),
        ("steer", {"new_tokens": 129}, "new_tokens must be a whole number from 1 to 128"),
        ("steer", {"new_tokens": 30}, "1 to 2 can be read when 30 are to be generated"),
        ("steer", {"temperature": -1}, "temperature must be a number from 0 to 5"),
        ("steer", {"seed": 2**40}, "seed must be"),
    ],
)
def test_requests_out_of_bounds_are_refused_with_the_reason(
    client: Any, path: str, changes: dict[str, Any], message: str
) -> None:
    import json

    body = json.dumps({**STEER, **changes})
    headers = {"Content-Type": "application/json"}
    answer = client.post(f"/api/{path}", content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize("body", ["", "[]", "{", "NaN", '{"prompt": ' + "[" * 20000])
def test_requests_that_are_no_object_are_refused(client: Any, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/read", content=body, headers=headers).status_code == 400


def test_infinite_values_are_refused(client: Any) -> None:
    body = '{"prompt": "word5", "layer": 0, "neuron": 0, "op": "add", "value": Infinity}'
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/steer", content=body, headers=headers)
    assert "value must be a number" in answer.json()["error"]


def test_second_continuation_at_the_same_time_is_refused(
    client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finish = threading.Event(), threading.Event()

    def slow(*_: Any) -> list[int]:
        started.set()
        assert finish.wait(20)
        return [5]

    monkeypatch.setattr(engine, "_generate", slow)
    answers: list[Any] = []
    request = {**STEER, "seed": 77}
    first = threading.Thread(target=lambda: answers.append(client.post("/api/steer", json=request)))
    first.start()
    assert started.wait(20)
    second = client.post("/api/steer", json=request)
    finish.set()
    first.join(20)
    assert second.status_code == 409
    assert "another continuation is being generated" in second.json()["error"]
    assert answers[0].status_code == 200


def test_failure_of_the_model_is_an_answer_and_not_a_trace(
    client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(engine, "_states", fail)
    answer = client.post("/api/read", json={"prompt": PROMPT})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_models_that_cannot_be_explored_are_refused(
    tmp_path: Path, folder: OpenModel, study: Path
) -> None:
    dense = make_model(tmp_path / "dense", layers=(), seed=5)
    with pytest.raises(AnalysisError, match="no TopK layers to explore"):
        open_engine(open_model(dense), None, None)
    other = open_model(make_model(tmp_path / "other", layers=(0,), seed=6))
    with pytest.raises(AnalysisError, match="has no run that was recorded from the model"):
        open_engine(other, study, None)
    with pytest.raises(AnalysisError, match="was recorded from another model"):
        open_engine(other, study, "topk")


def test_command_line_says_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["explorer.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path} holds no config.json")
    assert len(said.splitlines()) == 1
