"""Steering against plain PyTorch, and what it measures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.analysis.conftest import K
from tests.analysis.planted import analyze, assert_one_error
from topk_megatron.analysis.corpus import open_corpus
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.steer.generate import (
    Push,
    Sampling,
    generate,
    log_losses,
    logit_changes,
    repetition,
)
from topk_megatron.analysis.steer.run import equal_activity
from topk_megatron.analysis.study import Run
from topk_megatron.analysis.tables import read_table
from topk_megatron.hf.model import OpenModel, open_model

PROMPTS = torch.tensor([[5, 9, 2, 40], [7, 7, 3, 60]])
PUSHES = [Push(1, 17, 6.0), Push(0, 3, -4.0)]


@pytest.fixture(scope="module", params=["topk", "dense"])
def folder(request: pytest.FixtureRequest) -> OpenModel:
    return open_model(request.getfixturevalue(f"{request.param}_folder"))


def by_hand(
    folder: OpenModel, prompt: torch.Tensor, push: Push, steps: int
) -> tuple[list[int], ...]:
    """Greedy continuation without a cache, by a forward hook that adds to the layer's output."""

    def add(_module, _inputs, output):
        output = output.clone()
        output[..., push.neuron] += push.amount
        return output

    tokens = prompt[None]
    hook = folder.model.model.layers[push.layer].register_forward_hook(add)
    for _ in range(steps):
        with torch.no_grad():
            logits = folder.model(tokens).logits[0, -1]
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
    hook.remove()
    return (tokens[0, len(prompt) :].tolist(),)


def test_steering_by_hand_gives_the_same_text(folder: OpenModel) -> None:
    found = generate(folder, PROMPTS, PUSHES, [0, 1], Sampling(12, 0.0, 0))
    plain = generate(folder, PROMPTS, [None, None], [0, 1], Sampling(12, 0.0, 0))
    for row in range(2):
        expected = by_hand(folder, PROMPTS[row], PUSHES[row], 12)[0]
        assert found[row].tolist() == expected
    assert not torch.equal(found, plain)


def test_a_push_of_0_changes_nothing_bitwise(folder: OpenModel) -> None:
    none = [Push(1, 17, 0.0), Push(0, 3, 0.0)]
    sampling = Sampling(12, 1.0, 0)
    assert torch.equal(
        generate(folder, PROMPTS, none, [0, 1], sampling),
        generate(folder, PROMPTS, [None, None], [0, 1], sampling),
    )
    assert torch.equal(logit_changes(folder, PROMPTS, [none[0]]), torch.zeros(1, 96))


def test_rows_of_one_group_draw_the_same_numbers(folder: OpenModel) -> None:
    prompts = PROMPTS[[0, 0, 0]]
    found = generate(folder, prompts, [None] * 3, [0, 0, 1], Sampling(12, 1.0, 3))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_losses_are_those_of_the_new_tokens(folder: OpenModel) -> None:
    new = torch.tensor([[4, 8, 15], [16, 23, 42]])
    found = log_losses(folder, PROMPTS, new)
    for row in range(2):
        with torch.no_grad():
            logits = folder.model(torch.cat([PROMPTS[row], new[row]])[None]).logits[0]
        shares = torch.log_softmax(logits, dim=-1)
        expected = -sum(shares[3 + n, token] for n, token in enumerate(new[row])) / 3
        assert found[row].item() == pytest.approx(float(expected), rel=1e-4)


def test_repetition_counts_what_was_said_before() -> None:
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7]])
    assert repetition(tokens).tolist() == [0.25, 0, 0.75]
    assert repetition(tokens[:, :2]).tolist() == [0, 0, 0]


def test_the_control_is_another_neuron_of_nearly_equal_activity() -> None:
    totals = np.array([5, 100, 98, 103, 1, 99, 101, 7, 0])
    rng = np.random.default_rng(0)
    found = {equal_activity(totals, 1, rng) for _ in range(100)}
    assert found == {2, 3, 5, 6, 7}
    assert equal_activity(np.array([4, 9]), 0, rng) == 1


@pytest.fixture(scope="module")
def run(topk_folder: Path, token_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    study = tmp_path_factory.mktemp("study")
    corpus = open_corpus(str(token_corpus), lambda: None)
    return record(
        make_source(open_model(topk_folder)), corpus, RecordConfig(study=study, run="topk")
    )


def flags(run: Run, topk_folder: Path, token_corpus: Path) -> list[object]:
    study = run.directory.parents[1]
    found: list[object] = ["steer", "--model", topk_folder, "--study", study, "--run", "topk"]
    return [*found, "--corpus", token_corpus, "--new-tokens", 8, "--samples", 2]


def test_the_sweep_measures_every_push_and_its_control(
    run: Run, topk_folder: Path, token_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sample", 3, "--min-count", 10, "--strengths", 0, 2]
    base = flags(run, topk_folder, token_corpus)
    code, _, err = analyze(monkeypatch, *base, *options)
    assert code == 0, err
    study = run.directory.parents[1]
    table = read_table(study / "steer" / "neurons.parquet").to_pandas()
    assert len(table) == 2 * 3 * 2 * 2
    still = table[table["strength"] == 0]
    assert (still[["success", "damage"]].abs() < 1e-6).all(axis=None)
    assert (table["steered_neuron"] == table["neuron"]).eq(~table["control"]).all()
    pushed = table[table["strength"] == 2]
    assert (pushed["damage"] > 0).mean() > 0.5
    assert np.allclose(table["success"], table["concept_rate"] - table["base_rate"])
    samples = read_table(study / "steer" / "samples.parquet").to_pandas()
    same = samples[samples["strength"] == 0]
    assert (same["steered"] == same["unsteered"]).all()
    tokens = read_table(study / "steer" / "tokens.parquet").to_pandas()
    assert (tokens.query("direction == 'promoted' and rank == 0")["change"] > 0).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--neurons", "1:32"], "neuron 32 is out of range; the run topk has neurons 0 to 31"),
        (["--neurons", "2:3"], "layer 2 was not recorded in the run topk; its layers are 0, 1"),
        (["--neurons", "17"], "LAYER:NEURON"),
        (["--new-tokens", 100], "more than the 32 positions"),
        (["--min-count", 10**9], "lower --min-count"),
        (["--model", "OTHER"], "was recorded with another model"),
        (["--temperature", -1], "--temperature must be at least 0"),
        (["--samples", 10**6], "too short for"),
    ],
)
def test_bad_input_is_one_line(
    options: list[object],
    reason: str,
    run: Run,
    topk_folder: Path,
    dense_folder: Path,
    token_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [dense_folder if option == "OTHER" else option for option in options]
    base = flags(run, topk_folder, token_corpus)
    assert_one_error(analyze(monkeypatch, *base, *options), reason)


def test_fixture_has_k_survivors(run: Run) -> None:
    assert run.manifest["k"] == K
