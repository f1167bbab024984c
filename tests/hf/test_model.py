"""The exported model under the transformers that is installed.

`test_versions.py` runs this file again under transformers 4.57.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf.models import FAMILIES, HIDDEN, MOE, TOPK, K, make_config, make_model, make_tokens
from topk_megatron.hf.modeling import selection_topk
from topk_megatron.hf.modeling.modeling_topk import TopKLMForCausalLM
from topk_megatron.ops.reference import topk_mask_reference

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded_by_its_own_code_gives_bitwise_equal_logits(
    family: str, tmp_path: Path
) -> None:
    model, tokens = make_model(family), make_tokens()
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert type(again).__module__.startswith("transformers_modules")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(tmp_path / "second"), tokens), logits(model, tokens))
    first, second = ((tmp_path / n / "config.json").read_text() for n in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache_equals_generation_without(family: str) -> None:
    model, tokens = make_model(family), make_tokens()
    cached = model.generate(tokens, max_new_tokens=24, **GREEDY)
    assert cached.shape == (2, 34)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=24, use_cache=False, **GREEDY))


@pytest.mark.parametrize("family", ["default", "gelu-layernorm-biases", "experts", "linear-rope"])
def test_left_padding_does_not_change_what_a_row_generates(family: str) -> None:
    model, tokens = make_model(family), make_tokens(1, 6)
    longer = make_tokens(1, 9)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1), longer])
    batch = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=16, **GREEDY)
    alone = model.generate(tokens, max_new_tokens=16, **GREEDY)
    assert torch.equal(batch[0, 3:], alone[0])
    assert torch.equal(batch[1], model.generate(longer, max_new_tokens=16, **GREEDY)[0])


def test_hidden_states_are_the_sparse_states() -> None:
    model, tokens = make_model(), make_tokens()
    outputs = model(tokens, output_hidden_states=True)
    nonzero = [(state != 0).sum(-1).unique().tolist() for state in outputs.hidden_states]
    assert nonzero == [[HIDDEN], [K], [K], [HIDDEN]]
    with model.sparse_states() as states:
        model(tokens)
    assert list(states) == [0, 1] == list(model.topk_layers)
    for layer, state in states.items():
        assert state.values.shape == state.indices.shape == (2, 10, K)
        assert torch.equal(state.to_dense(HIDDEN), outputs.hidden_states[layer + 1])
        assert (state.indices.diff(dim=-1) > 0).all()


def test_layer_output_is_the_definition_of_topk_on_what_enters_it() -> None:
    model, tokens = make_model("abs"), make_tokens()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer: Any = model.model.layers[1]
    layer.topk.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    model(tokens)
    expected, _ = topk_mask_reference(seen[0][0], K, "abs")
    assert torch.equal(seen[0][1], expected)


def test_grouped_mlp_keeps_its_share_in_every_group() -> None:
    model, tokens = make_model("both-sites-groups"), make_tokens()
    with model.sparse_states(site="mlp") as states:
        model(tokens)
    groups = states[0].indices // (96 // 4)
    assert (torch.nn.functional.one_hot(groups, 4).sum(-2) == 3).all()


@pytest.mark.parametrize("family", ["default", "abs", "both-sites-groups", "experts"])
def test_without_the_package_results_and_gradients_are_bitwise_equal(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(family), make_tokens()
    # Ties in every row: the definition and the operator must break them alike.
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.round(decimals=1))

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(tokens, labels=tokens)
        output.loss.backward()
        with model.sparse_states() as states:
            model(tokens)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [output.logits, *grads, *(states[n].indices for n in states)]

    assert selection_topk.FUSED
    fused = run()
    for name in ("topk_mask", "topk_mask_with_bits", "pack_sparse"):
        monkeypatch.setattr(selection_topk, name, None)
    plain = run()
    assert len(fused) > 20
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, tokens = make_model("experts").train(), make_tokens()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with (
        pytest.raises(ValueError, match="gradient checkpointing runs layers twice"),
        model.sparse_states(),
    ):
        pass


def test_compiles_to_one_graph() -> None:
    model, tokens = make_model(), make_tokens()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled, tokens), logits(model, tokens))


def test_loads_in_bfloat16_and_the_states_are_as_sparse(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    output = model(make_tokens(), output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    assert ((output.hidden_states[1] != 0).sum(-1) <= K).all()


def test_device_map_splits_between_layers_and_changes_nothing(tmp_path: Path) -> None:
    model, tokens = make_model("tied"), make_tokens()
    model.save_pretrained(tmp_path / "model")
    places = {f"model.layers.{n}": "disk" if n else "cpu" for n in range(3)}
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    split = load(
        tmp_path / "model",
        device_map={**places, **dict.fromkeys(outside, "cpu")},
        offload_folder=str(tmp_path / "offload"),
    )
    assert torch.equal(logits(split, tokens), logits(model, tokens))
    assert set(split._no_split_modules) == {"TopKDecoderLayer"}


def test_padding_at_the_end_of_a_batch_trains_like_the_rows_alone() -> None:
    model, tokens = make_model(), make_tokens()
    labels = tokens.clone()
    labels[0, 7:] = -100
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    alone = [
        model(tokens[:1, :7], labels=tokens[:1, :7]).loss,
        model(tokens[1:], labels=tokens[1:]).loss,
    ]
    assert loss.item() == pytest.approx((6 * alone[0].item() + 9 * alone[1].item()) / 15, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"topk": None}, "topk must have exactly the keys site, k, layers"),
        ({"topk": {**TOPK, "threshold": 1}}, "topk must have exactly the keys"),
        ({"topk": {**TOPK, "k": 65}}, r"topk.k must be in \[1, hidden_size=64\], got 65"),
        ({"topk": {**TOPK, "layers": [0, 3]}}, "topk.layers must be in 0 to 2"),
        ({"topk": {**TOPK, "layers": [1, 1]}}, "without repetition"),
        ({"topk": {**TOPK, "mode": "relu"}}, "topk.mode must be one of value, abs, got 'relu'"),
        ({"topk": {**TOPK, "site": "mlp"}}, "topk.mlp_k must be in"),
        ({"topk": {**TOPK, "site": "mlp", "mlp_k": 12, "mlp_groups": 5}}, "mlp_groups must divide"),
        ({"normalization": "ScaleNorm"}, "normalization must be one of RMSNorm, LayerNorm"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 3"),
        ({**MOE, "num_experts_per_tok": 5}, r"num_experts_per_tok must be in \[1, num_experts=4\]"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "make them equal"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "rope_type must be one of"),
    ],
)
def test_configuration_that_describes_no_model_is_refused(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_config(**changes)


def test_weights_of_another_model_are_not_taken_for_ours(tmp_path: Path) -> None:
    make_model("qk-norm").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"qk_norm": true', '"qk_norm": false'))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert len(loaded[1]["unexpected_keys"]) == 6


def test_base_model_can_be_read_and_steered_too() -> None:
    model = make_model()
    assert isinstance(model, TopKLMForCausalLM)
    with model.model.sparse_states(layers=[1]) as states:
        model.model(make_tokens())
    assert list(states) == [1]
