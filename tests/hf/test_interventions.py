"""Changing neurons: exact, where asked and nowhere else, with cache and in batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.hf.models import HIDDEN, K, make_model, make_tokens
from topk_megatron.hf.modeling.modeling_topk import Intervention

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
OPERATIONS = {
    "set": (2.5, lambda old: torch.full_like(old, 2.5)),
    "add": (-1.5, lambda old: old - 1.5),
    "scale": (3.0, lambda old: 3.0 * old),
    "ablate": (None, torch.zeros_like),
}


@contextmanager
def by_hand(model: Any, layer: int, change: Any) -> Iterator[None]:
    """The same in plain PyTorch: a hook that rewrites the output of the layer's TopK."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return change(output.clone())

    decoder: Any = model.model.layers[layer]
    handle = decoder.topk.register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("op", OPERATIONS)
def test_equals_a_hook_written_by_hand_bitwise(op: str) -> None:
    model, tokens = make_model(), make_tokens()
    value, function = OPERATIONS[op]
    with model.sparse_states([1]) as states:
        model(tokens)
    neuron = int(states[1].indices.flatten().mode().values)  # one that fires often

    def change(y: torch.Tensor) -> torch.Tensor:
        y[..., neuron] = function(y[..., neuron])
        return y

    with by_hand(model, 1, change):
        expected = model(tokens).logits
    with model.intervene(Intervention(layer=1, neuron=neuron, op=op, value=value)):
        assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(("op", "value"), [("add", 0.0), ("scale", 1.0)])
def test_a_neuron_steered_by_nothing_changes_nothing_bitwise(op: str, value: float) -> None:
    model, tokens = make_model("abs"), make_tokens()
    changes = [Intervention(layer=0, neuron=n, op=op, value=value) for n in range(HIDDEN)]
    with model.intervene(*changes):
        steered = model(tokens, output_hidden_states=True)
    plain = model(tokens, output_hidden_states=True)
    for a, b in zip(steered.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_holds_at_absolute_positions_while_generating_with_cache() -> None:
    model, tokens = make_model(), make_tokens()
    change = Intervention(layer=1, neuron=5, op="set", value=30.0, positions=[4, 12, 13])
    with model.intervene(change), model.sparse_states([1]) as states:
        cached = model.generate(tokens, max_new_tokens=12, **GREEDY)
    dense = states[1].to_dense(HIDDEN)[..., 5]
    assert dense.shape == (2, 21)  # the last token is never read
    assert (dense == 30).nonzero()[:, 1].tolist() == [4, 12, 13] * 2
    with model.intervene(change):
        again = model.generate(tokens, max_new_tokens=12, use_cache=False, **GREEDY)
    assert torch.equal(cached, again)


def test_padded_rows_count_positions_from_their_own_first_token() -> None:
    model, tokens = make_model(), make_tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    change = Intervention(layer=0, neuron=7, op="add", value=40.0, positions=[2, 8])
    with model.intervene(change):
        alone = model.generate(tokens, max_new_tokens=10, **GREEDY)
        batch = model.generate(
            padded, attention_mask=(padded != 0).long(), max_new_tokens=10, **GREEDY
        )
    assert torch.equal(batch[0, 4:], alone[0])
    assert not torch.equal(alone, model.generate(tokens, max_new_tokens=10, **GREEDY))


def test_only_the_named_rows_and_tokens_are_touched() -> None:
    model, tokens = make_model(), make_tokens(3)
    wanted = [int(tokens[1, 2]), int(tokens[1, 5])]
    change = Intervention(layer=1, neuron=9, op="set", value=11.0, tokens=wanted, rows=[1, 2])
    with model.intervene(change), model.sparse_states([1]) as states:
        model(tokens)
    touched = states[1].to_dense(HIDDEN)[..., 9] == 11
    expected = torch.isin(tokens, torch.tensor(wanted)) & torch.tensor([[False], [True], [True]])
    assert expected.sum() >= 2
    assert torch.equal(touched, expected)


def test_rows_with_and_without_a_change_equal_batches_of_their_own() -> None:
    model, tokens = make_model(), make_tokens(1)
    changes = [Intervention(layer=1, neuron=5, op="set", value=8.0 * n, rows=[n]) for n in (1, 2)]
    with model.intervene(*changes):
        together = model.generate(tokens.repeat(3, 1), max_new_tokens=8, **GREEDY)
    for row in range(3):
        alone = [Intervention(layer=1, neuron=5, op="set", value=8.0 * row)] if row else []
        with model.intervene(*alone):
            expected = model.generate(tokens, max_new_tokens=8, **GREEDY)
        assert torch.equal(together[row], expected[0])


def test_a_neuron_that_did_not_survive_is_recorded_when_it_is_switched_on() -> None:
    model, tokens = make_model(), make_tokens()
    with model.sparse_states([0]) as states:
        model(tokens)
        before = states[0].to_dense(HIDDEN)
        states.clear()
        with model.intervene(Intervention(layer=0, neuron=3, op="set", value=0.5)):
            model(tokens)
    state = states[0]
    expected = before.clone()
    expected[..., 3] = 0.5
    assert torch.equal(state.to_dense(HIDDEN), expected)
    assert state.indices.shape[-1] == K + 1
    fired = (before[..., 3] != 0).sum()
    assert (state.indices == -1).sum() == fired  # rows that had it already are one shorter


def test_several_changes_are_made_in_their_order_and_contexts_nest() -> None:
    model, tokens = make_model(), make_tokens()
    outer = Intervention(layer=0, neuron=3, op="set", value=2.0)
    inner = Intervention(layer=0, neuron=3, op="scale", value=3.0)
    with model.intervene(outer), model.sparse_states([0]) as states:
        with model.intervene(inner):
            model(tokens)
        model(tokens)
    dense = states[0].to_dense(HIDDEN)
    assert dense[0, :, 3].tolist() == [6.0] * 10 + [2.0] * 10


def test_contexts_leave_nothing_behind_after_an_error() -> None:
    model, tokens = make_model(), make_tokens()
    plain = model(tokens).logits
    with (
        pytest.raises(RuntimeError, match="stop"),
        model.sparse_states(),
        model.intervene(Intervention(layer=1, neuron=5, op="set", value=30.0)),
    ):
        raise RuntimeError("stop")
    assert torch.equal(model(tokens).logits, plain)
    assert not model.model._forward_pre_hooks


def test_mlp_neurons_can_be_changed() -> None:
    model, tokens = make_model("both-sites-groups"), make_tokens()
    change = Intervention(layer=1, neuron=90, op="set", value=9.0, site="mlp")
    with model.intervene(change), model.sparse_states(site="mlp") as states:
        model(tokens)
    assert (states[1].to_dense(96)[..., 90] == 9).all()
    assert not (states[0].to_dense(96)[..., 90] == 9).any()


def test_compiled_models_are_steered_too() -> None:
    model, tokens = make_model(), make_tokens()
    compiled: Any = torch.compile(model, backend="aot_eager")
    compiled(tokens)
    change = Intervention(layer=1, neuron=5, op="set", value=30.0, positions=[3])
    with torch.no_grad(), model.intervene(change):
        assert torch.equal(compiled(tokens).logits, model(tokens).logits)


def test_embeddings_in_place_of_tokens_can_be_steered_at_positions_only() -> None:
    model, tokens = make_model(), make_tokens()
    embeds = model.model.embed_tokens(tokens)
    at = Intervention(layer=1, neuron=5, op="set", value=30.0, positions=[3])
    with model.intervene(at):
        assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    on = Intervention(layer=1, neuron=5, op="set", value=30.0, tokens=[3])
    with model.intervene(on), pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layer": 2}, "layer 2 has no TopK at the residual site; layers that have one: 0, 1"),
        ({"layer": 0, "site": "mlp"}, "none: the model is dense there"),
        ({"neuron": 64}, r"neuron must be in \[0, 63\], got 64"),
        ({"op": "push"}, "op must be one of set, add, scale, ablate, got 'push'"),
        ({"value": None}, "op 'set' needs a value"),
        ({"op": "ablate"}, "op 'ablate' takes no value, got 1.0"),
        ({"site": "attention"}, "site must be one of residual, mlp"),
    ],
)
def test_wrong_interventions_are_refused(change: dict[str, Any], complaint: str) -> None:
    model = make_model()
    settings: dict[str, Any] = {"layer": 0, "neuron": 0, "value": 1.0, **change}
    with pytest.raises(ValueError, match=complaint), model.intervene(Intervention(**settings)):
        pass


def test_layers_that_were_not_recorded_are_named() -> None:
    model = make_model()
    with model.sparse_states([1]) as states:
        with pytest.raises(KeyError, match="has no recording yet"):
            states[1]
        with pytest.raises(KeyError, match=r"layer 0 was not recorded; recorded layers are \[1\]"):
            states[0]
    with pytest.raises(ValueError, match="layer 5 has no TopK"), model.sparse_states([5]):
        pass
