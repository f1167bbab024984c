"""Arms do what their docstrings say, and the product's own method trains the same under a trial."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.ladder import trials, tune
from examples.ladder.arms import ARMS
from examples.ladder.grid import last_of_each, value_of
from examples.ladder.text import REPOSITORY
from tests.harness.launch import TINY_MODEL, TINY_TRAINING, pretrain
from topk_megatron.ops import topk_mask

WIDTH = 32


def with_k(k: int, final: int | None = None) -> Any:
    """Return what an arm reads of the runtime."""
    return Namespace(k=k, config=Namespace(k=final or k, mode="value"))


def states(seed: int, rows: int = 6) -> torch.Tensor:
    return torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, WIDTH - 1), st.sampled_from(["topk", "gate", "balance"]))
def test_arms_with_a_fixed_number_keep_the_k_largest(seed: int, k: int, name: str) -> None:
    """A gate does at temperature 0, and a balance before any neuron has a bonus."""
    x = states(seed)
    with torch.no_grad():
        left = ARMS[name]("").leave(x, x, with_k(k), 0)
    assert torch.equal(left, topk_mask(x, k))
    assert ARMS[name]("").read(x, with_k(k)) is x


@given(st.integers(0, 99), st.integers(1, 7), st.sampled_from(["reads", "normed", "two", "leak"]))
def test_sparse_reads_are_the_k_largest_of_what_is_left(seed: int, k: int, name: str) -> None:
    x = states(seed)
    arm = ARMS[name]("")
    left = arm.leave(x, x, with_k(k), 0)
    assert torch.equal(arm.read(left, with_k(k)), topk_mask(x, k))
    kept = {"reads": WIDTH, "normed": WIDTH, "two": 4 * k, "leak": WIDTH}[name]
    assert ((left != 0).sum(-1) == kept).all()


def test_a_leak_halves_what_is_not_read() -> None:
    x = states(1)
    left = ARMS["leak"]("by=0.25").leave(x, x, with_k(4), 0)
    read = topk_mask(x, 4)
    assert torch.allclose(left, torch.where(read != 0, x, x / 4))


def test_an_update_is_sparse_and_the_stream_is_its_sum() -> None:
    before, x = states(1), states(2)
    left = ARMS["update"]("").leave(x, before, with_k(4), 0)
    assert torch.allclose(left - before, topk_mask(x - before, 4), atol=1e-6)


@given(st.integers(0, 99), st.integers(1, WIDTH - 1))
def test_a_shrunk_state_does_not_jump_where_the_selection_changes(seed: int, k: int) -> None:
    """The two values at the border swap places; a TopK jumps there by their size."""
    x = states(seed, rows=1)
    order = x.argsort(-1, descending=True)[0, 0]
    x[0, 0, order[k]] = x[0, 0, order[k - 1]] - 1e-5
    swapped = x.clone()
    swapped[0, 0, order[[k - 1, k]]] = x[0, 0, order[[k, k - 1]]]
    one, other = (ARMS["shrink"]("").leave(each, each, with_k(k), 0) for each in (x, swapped))
    assert (one - other).abs().max() < 1e-4
    assert (one > 0).sum() <= k


def test_a_gate_is_soft_while_k_falls() -> None:
    x = states(3)
    left = ARMS["gate"]("temperature=1").leave(x, x, with_k(8, final=4), 0)
    assert (left != 0).all()
    hard = topk_mask(x, 8)
    assert ((left - hard).abs() <= x.abs()).all()


def test_a_batch_keeps_k_a_token_on_average_and_a_threshold_for_evaluation() -> None:
    arm, x = ARMS["batch"](""), states(4, rows=500)
    left = arm.leave(x, x, with_k(4), 0)
    assert (left != 0).sum() == 4 * 500
    assert (left != 0).sum(-1).float().std() > 0.5
    with torch.no_grad():
        other = states(5, rows=500)
        mean = (arm.leave(other, other, with_k(4), 0) != 0).sum(-1).float().mean()
    assert mean == pytest.approx(4, rel=0.1)


def test_a_balance_lets_a_neuron_fire_that_never_did() -> None:
    arm, rare = ARMS["balance"]("by=0.1"), 0
    fired = []
    for seed in range(60):
        x = states(seed)
        x[..., rare] -= 4
        fired.append(bool((arm.leave(x, x, with_k(8), 0)[..., rare] != 0).any()))
    assert not any(fired[:10])
    assert any(fired[-10:])


def test_states_are_sparse_behind_attention_too() -> None:
    arm, x = ARMS["states"](""), states(6)
    left = arm.leave(x, x, with_k(4), 0)
    assert torch.equal(left, topk_mask(x, 4))
    assert torch.equal(arm.read(left, with_k(4)), left)
    assert torch.equal(arm.read(x, with_k(4)), topk_mask(x, 4))


def test_shared_neurons_are_kept_beside_the_largest_others() -> None:
    x = states(7)
    left = ARMS["shared"]("count=3").leave(x, x, with_k(8), 0)
    assert torch.equal(left[..., :3], x[..., :3])
    assert torch.equal(left[..., 3:], topk_mask(x[..., 3:], 5))


def test_a_penalty_adds_its_gradient_and_changes_no_value() -> None:
    x = states(8).requires_grad_()
    left = ARMS["penalty"]("by=0.5").leave(x, x, with_k(WIDTH), 0)
    assert torch.equal(left, x)
    (gradient,) = torch.autograd.grad(left.sum(), x)
    y = x.detach().clone().requires_grad_()
    penalised = y.sum() + 0.5 * (y.abs().sum(-1) / y.norm(dim=-1)).sum()
    assert torch.allclose(gradient, torch.autograd.grad(penalised, y)[0], atol=1e-6)


def test_an_unknown_option_ends_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"error: expected options \['by'\], got \{'to'\}"):
        ARMS["leak"]("to=1")


@pytest.mark.parametrize(
    "file", sorted((trials.HERE / "trials").glob("*.args")), ids=lambda f: f.stem
)
def test_every_trial_says_what_was_predicted(file: Path) -> None:
    trial = trials.read_trial(file)
    assert trial.notes["arm"].partition(":")[0] in ARMS
    ARMS[trial.notes["arm"].partition(":")[0]](trial.notes["arm"].partition(":")[2])
    assert trial.about.endswith(".")
    assert trial.notes["predicted"]
    assert trial.number("--topk-k") >= 1
    assert not any("{" in flag for flag in trial.flags)


def test_a_trial_without_a_prediction_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rash.args"
    file.write_text("# Rash.\n# arm: reads\n# reason: none\n--topk-k 1\n")
    with pytest.raises(SystemExit, match="has no line '# predicted"):
        trials.read_trial(file)


def test_the_tax_is_that_to_the_twin_of_the_same_width(tmp_path: Path) -> None:
    def made(name: str, loss: float) -> tuple[trials.Trial, dict[str, Any]]:
        layer = {"silent": 0.5, "activations": [100, 300, 1], "token_entropy": [2.0, 4.0, 9.0]}
        trial = trials.read_trial(trials.HERE / "trials" / f"{name}.args")
        return trial, {"loss": loss, "entropy_of_tokens": 9.0, "neurons": {"0": layer}}

    page = tmp_path / "TRIALS.md"
    models = {"dense": 4.5, "dense-narrow": 4.75, "mlp": 4.4, "reads-6": 4.52}
    found = [made(name, loss) for name, loss in models.items()]
    trials.write_page(found, page)
    (row,) = (line for line in page.read_text().splitlines() if line.startswith("| `reads-6`"))
    # 9 - log2(192 / 6) = 4 bits; (100 * 2 + 300 * 4 + 1 * 9) / 401 = 3.51.
    assert row == "| `reads-6` | 192 | 6 | 4.520 | +0.020 | +2.0 | 3.00 | 3.51 | 4.00 | 50% |"
    assert "| `dense-narrow` | 96 | 6 | 4.750 |  |  |" in page.read_text()
    # Its stream is dense, but it is no twin: its MLP is sparse.
    assert "| `mlp` | 192 | 12 | 4.400 | -0.100 | -9.5 |" in page.read_text()


def test_a_flag_given_again_replaces_the_one_before() -> None:
    words = ["--lr", "1", "--bf16", "--size", "3", "4", "--lr", "2", "--bf16"]
    assert last_of_each(words) == ["--lr", "2", "--bf16", "--size", "3", "4"]


def test_every_method_is_tuned_by_the_same_budget(tmp_path: Path) -> None:
    made = tune.make_trials(["dense", "anneal"], [4, 6], rates=["1.6e-3", "4e-3"])
    names = [(trial.name, trial.number("--num-layers")) for trial in made]
    assert {names.count(name) for name in names} == {4}
    assert {value_of(trial.flags, "--lr") for trial in made} == {"1.6e-3", "4e-3"}
    found: list[tuple[trials.Trial, dict[str, Any]]] = []
    for trial in made[:8]:
        warm = trial.number("--lr-warmup-iters") > trial.number("--train-iters") / 10
        loss = {"dense": 5.0 + 0.002 * warm, "anneal": 5.1 - 0.06 * warm}[trial.name]
        found.append((trial, {"loss": loss + float(value_of(trial.flags, "--lr"))}))
    tune.write_page([*found, (made[8], {"loss": 4.0})], tmp_path / "TUNING.md")
    text = (tmp_path / "TUNING.md").read_text()
    assert "| method | 1.6e-3, 5% | 1.6e-3, 20% | 4e-3, 5% | 4e-3, 20% | tax, nats |" in text
    assert "| `dense` | **5.002** | 5.004 | 5.004 | 5.006 |  |" in text
    assert "| `anneal` | 5.102 | **5.042** | 5.104 | 5.044 | +0.040 (+0.100) |" in text
    assert "## Depth 6" in text


@pytest.mark.slow
def test_the_products_method_trains_the_same_under_a_trial(
    dataset: Path, tokenizer: Path, tmp_path: Path
) -> None:
    flags = [*TINY_MODEL, *TINY_TRAINING, "--num-workers", "0", "--eval-iters", "4"]
    flags += ["--train-data-path", str(dataset), "--valid-data-path", str(dataset)]
    flags += ["--data-cache-path", str(tmp_path / "cache")]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    flags += ["--topk-k", "8", "--topk-layers", "all,-2"]
    flags = [word for word in flags if word not in ("--split", "90,8,2")]
    product = pretrain(1, *flags)
    assert product.returncode == 0, product.output
    (expected,) = product.validation_losses()

    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "examples.ladder.trial", "topk", str(result), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
    assert found["neurons"].keys() == {"0", "1"}
    for layer in found["neurons"].values():
        assert sum(layer["activations"]) == 8 * 4 * 8 * 64  # k, batches, sequences, tokens
        shares = np.array(layer["activations"]) / sum(layer["activations"])
        assert shares @ layer["token_entropy"] < found["entropy_of_tokens"] < 9
