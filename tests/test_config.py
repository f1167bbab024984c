"""The accepted settings, their meaning, and the messages about wrong ones."""

from argparse import Namespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_megatron.config import TopKConfig, k_at, parse_layers
from topk_megatron.errors import ConfigError


def config(**changes: object) -> TopKConfig:
    settings = {"hidden_size": 256, "num_layers": 6, "k": 16, "layers": (0, 1, 2, 3)}
    return TopKConfig(**{**settings, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("all,-2", (0, 1, 2, 3)),
        ("all, -1", (0, 1, 2, 3, 4)),
        ("none", ()),
        ("0-2", (0, 1, 2)),
        ("5,0,2", (0, 2, 5)),
        ("0-1,4-5", (0, 1, 4, 5)),
        ("3", (3,)),
    ],
)
def test_layer_lists_are_read(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("6", "layer 6 is out of range; this model's layers are 0 to 5"),
        ("0-99999999999999", "layer 99999999999999 is out of range"),
        ("1,1", "layer 1 is listed twice"),
        ("0-3,2", "layer 2 is listed twice"),
        ("3-1", "the range 3-1 runs backwards"),
        ("-2", "got '-2'"),
        ("", "got ''"),
        ("0,,1", "got ''"),
        ("all,2", "got 'all'"),
        ("first", "got 'first'"),
        ("all,-6", "leaves no TopK layer in a model of 6 layers"),
    ],
)
def test_wrong_layer_lists_are_refused_with_a_reason(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_layers(text, 6)
    assert complaint in str(error.value)


@given(st.sets(st.integers(0, 40)))
def test_a_list_of_numbers_comes_back_sorted(layers: set[int]) -> None:
    text = ",".join(map(str, layers)) or "none"
    assert parse_layers(text, 41) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"k": 0}, "topk_k must be in [1, hidden_size=256], got 0; raise --topk-k"),
        ({"k": 257}, "topk_k must be in [1, hidden_size=256], got 257; lower --topk-k"),
        ({"mode": "largest"}, "--topk-mode must be one of value, abs"),
        ({"layers": (6,)}, "layer 6 is out of range"),
        ({"layers": (1, 1)}, "layer 1 is listed twice"),
        ({"anneal": "sudden"}, "--topk-anneal must be one of"),
        ({"anneal_end": 10}, "--topk-anneal is constant"),
        ({"anneal": "linear"}, "must end after it begins"),
        ({"anneal": "linear", "anneal_begin": 9, "anneal_end": 5}, "--topk-anneal-end is 5"),
        ({"anneal": "linear", "anneal_begin": -1, "anneal_end": 5}, "at least 0"),
        ({"anneal": "linear", "anneal_end": 5, "anneal_start_k": 999}, "anneal_start_k"),
        ({"site": "attention"}, "--topk-site must be one of residual, mlp, both"),
        ({"mlp_k": 8}, "--topk-site is residual"),
        ({"mlp_groups": 2}, "--topk-site is residual"),
        ({"site": "mlp"}, "--topk-site mlp needs --topk-mlp-k"),
        ({"site": "both", "mlp_k": 0}, "--topk-mlp-k must be at least 1, got 0"),
        ({"site": "both", "mlp_k": 8, "mlp_groups": 3}, "must divide --topk-mlp-k 8"),
        ({"site": "both", "mlp_k": 8, "mlp_groups": 0}, "must divide --topk-mlp-k 8"),
        ({"site": "mlp", "mlp_k": 8, "anneal": "linear", "anneal_end": 5}, "leaves that stream"),
    ],
)
def test_wrong_settings_say_what_to_change(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**changes)
    assert complaint in str(error.value)


def test_settings_survive_a_checkpoint() -> None:
    original = config(mode="abs", anneal="cosine", anneal_begin=3, anneal_end=9)
    assert TopKConfig.from_dict(original.to_dict()) == original
    with_mlp = config(site="both", mlp_k=8, mlp_groups=2)
    assert TopKConfig.from_dict(with_mlp.to_dict()) == with_mlp


def test_settings_from_before_the_mlp_site_mean_the_residual_site() -> None:
    settings = config(mode="abs").to_dict()
    for name in ("site", "mlp_k", "mlp_groups"):
        del settings[name]
    assert TopKConfig.from_dict(settings) == config(mode="abs", site="residual")
    for one in ({"site": "mlp"}, {"mlp_k": 4}, {"mlp_groups": None}):
        with pytest.raises(ConfigError, match="missing or unknown entries"):
            TopKConfig.from_dict({**settings, **one})
    with pytest.raises(ConfigError, match=r"unknown entries: .*mode"):
        TopKConfig.from_dict({name: settings[name] for name in settings if name != "mode"})


def test_layers_with_a_topk_depend_on_the_site() -> None:
    mlp, both = config(site="mlp", mlp_k=8), config(site="both", mlp_k=8)
    assert (config().residual_layers, config().mlp_layers) == ((0, 1, 2, 3), ())
    assert (mlp.residual_layers, mlp.mlp_layers) == ((), (0, 1, 2, 3))
    assert (both.residual_layers, both.mlp_layers) == ((0, 1, 2, 3), (0, 1, 2, 3))


@pytest.mark.parametrize("change", [{"surprise": 1}, {"mode": None}])
def test_missing_and_unknown_settings_of_a_checkpoint_are_errors(change: dict[str, object]) -> None:
    settings = {**config().to_dict(), **change}
    if settings["mode"] is None:
        del settings["mode"]
    with pytest.raises(ConfigError, match=next(iter(change))):
        TopKConfig.from_dict(settings)


_FLAGS = ("k", "layers", "mode", "anneal", "anneal_start_k", "anneal_begin", "anneal_end")
_MLP_FLAGS = ("site", "mlp_k", "mlp_groups")


def from_flags(**chosen: Any) -> TopKConfig:
    flags = {f"topk_{name}": chosen.pop(name, None) for name in (*_FLAGS, *_MLP_FLAGS)}
    return TopKConfig.from_args(Namespace(hidden_size=256, num_layers=6, **flags, **chosen))


def test_defaults_are_a_sixteenth_of_the_neurons_at_all_but_two_layers() -> None:
    settings = from_flags()
    assert (settings.k, settings.layers, settings.mode) == (16, (0, 1, 2, 3), "value")


@pytest.mark.parametrize(
    ("chosen", "end"),
    [
        ({"anneal": "linear", "train_iters": 100}, 50),
        ({"anneal": "linear", "train_iters": 100, "anneal_begin": 20}, 60),
        ({"anneal": "linear", "train_iters": 100, "anneal_end": 7}, 7),
        ({"anneal": "linear", "train_iters": 1}, 1),
        ({"anneal": "linear", "anneal_end": 7}, 7),
        ({"anneal": "constant", "train_iters": 100}, 0),
        ({"train_iters": 100}, 0),
    ],
)
def test_annealing_ends_halfway_by_default(chosen: dict[str, Any], end: int) -> None:
    assert from_flags(**chosen).anneal_end == end


def test_annealing_that_would_begin_after_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be below --train-iters 100, got 100"):
        from_flags(anneal="linear", anneal_begin=100, train_iters=100)


def test_without_a_number_of_iterations_the_end_of_annealing_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--topk-anneal-end unless --train-iters"):
        from_flags(anneal="linear", train_iters=None)


KINDS = ("linear", "cosine", "exponential")


@pytest.mark.parametrize("kind", KINDS)
@given(
    start=st.integers(1, 256),
    k=st.integers(1, 256),
    begin=st.integers(0, 50),
    length=st.integers(1, 50),
)
def test_k_moves_from_start_to_end_without_turning_back(
    kind: str, start: int, k: int, begin: int, length: int
) -> None:
    end = begin + length
    settings = config(k=k, anneal=kind, anneal_start_k=start, anneal_begin=begin, anneal_end=end)
    ks = [k_at(settings, iteration) for iteration in range(end + 3)]
    assert set(ks[: begin + 1]) == {start}
    assert set(ks[end:]) == {k}
    assert ks == sorted(ks, reverse=start > k)


def test_k_halfway_follows_the_formula() -> None:
    half = {"anneal_begin": 0, "anneal_end": 10, "k": 16}
    assert k_at(config(anneal="linear", **half), 5) == (256 + 16) // 2
    assert k_at(config(anneal="cosine", **half), 5) == (256 + 16) // 2
    assert k_at(config(anneal="exponential", **half), 5) == 64
    assert k_at(config(), 5) == 16
