"""Parameters are counted exactly, and models that plans do not cover are refused."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from tests.plan.conftest import SMALL
from tests.plan.published import MODELS, Published, published_shape
from topk_megatron.errors import ConfigError
from topk_megatron.plan.command_lines import (
    layout_flags,
    layout_in,
    read_flags,
    shape_of,
    without_layout,
)
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape


def test_parameters_equal_a_count_by_hand(small: Callable[..., Shape]) -> None:
    ffn = 128  # 64 · 8 / 3 / 64, rounded down, times 64
    attention, mlp, norms = 4 * 64 * 64, 3 * 64 * ffn, 2 * 64
    assert small().parameters == 8 * (attention + mlp + norms) + 64 + 1024 * 64


def test_parameters_equal_a_count_by_hand_with_biases_and_learned_positions() -> None:
    flags = (
        "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 4 --vocab-size 128 "
        "--max-position-embeddings 4 --untie-embeddings-and-output-weights --topk-layers none"
    )
    layer = (24 * 8 + 24) + (8 * 8 + 8) + (32 * 8 + 32) + (8 * 32 + 8) + 4 * 8
    assert shape_of(flags.split()).parameters == 2 * layer + 2 * 8 + 2 * 128 * 8 + 4 * 8


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (4, 2), (8, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_all_ranks_together_hold_the_model(
    small: Callable[..., Shape], tp: int, pp: int, tied: bool
) -> None:
    shape = small(*([] if tied else ["--untie-embeddings-and-output-weights"]))
    held = sum(tp * shape.stage_parameters(tp, pp, stage) for stage in range(pp))
    norms = (tp - 1) * (2 * shape.layers + 1) * shape.hidden  # whole on each rank
    padding = (shape.padded(tp) - shape.padded(1)) * shape.hidden
    copies = 1 if tied and pp == 1 else 2
    second_copy = shape.padded(1) * shape.hidden if tied and pp > 1 else 0
    assert held == shape.parameters + norms + copies * padding + second_copy


def test_stages_have_all_layers_once(small: Callable[..., Shape]) -> None:
    shape = small()
    layers = [layer for stage in range(4) for layer in shape.stage_layers(4, stage)]
    assert layers == list(range(8))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.billions}B")
def test_published_sizes_come_out(model: Published) -> None:
    assert published_shape(model).parameters / 1e9 == pytest.approx(model.billions, abs=0.06)


def test_later_flags_win() -> None:
    assert shape_of([*SMALL, "--topk-k", "7"]).topk.k == 7


def test_operations_of_a_layer_are_twice_its_matrices_and_half_of_full_attention(
    small: Callable[..., Shape],
) -> None:
    shape = small()
    matrices = sum(prod(size) for size in shape.layer_shapes(1).values() if len(size) == 2)
    scores_and_values = 2 * 2 * shape.sequence * shape.hidden / 2
    assert shape.layer_flops() == 2 * matrices + scores_and_values


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num-experts", "8"], "--num-experts is not planned for"),
        (["--hybrid-layer-pattern", "M*-"], "--hybrid-layer-pattern is not planned for"),
        (["--context-parallel-size=2"], "--context-parallel-size is not planned for"),
        (["--num-layers", "0"], "--num-layers must be at least 1, got 0"),
        (["--num-layers", "many"], "argument --num-layers: invalid int value: 'many'"),
        (["--num-attention-heads", "7"], "--hidden-size 64 must be divisible by"),
        (["--group-query-attention", "--num-query-groups", "3"], "divisible by --num-query-groups"),
        (["--topk-k", "65"], r"topk_k must be in \[1, hidden_size=64\], got 65"),
        (["--topk-layers", "8"], "layer 8 is out of range"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        shape_of([*SMALL, *flags])


def test_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="--vocab-size is required"):
        shape_of(["--num-layers", "2", "--hidden-size", "8", "--num-attention-heads", "2",
                  "--seq-length", "4"])  # fmt: skip


def test_argument_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.args cannot be read"):
        read_flags(tmp_path / "none.args")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=1, pp=1, dp=8),
        Layout(tp=4, pp=2, dp=1, recompute=True, sparse_p2p=True, sparse_save=True),
    ],
)
def test_layout_survives_being_written_as_flags(layout: Layout) -> None:
    before = ["--lr", "1e-3", "--tensor-model-parallel-size=2", "--recompute-granularity", "full"]
    kept = without_layout([*before, "--topk-sparse-save", "--clip-grad", "1.0"])
    assert kept == ["--lr", "1e-3", "--clip-grad", "1.0"]
    assert layout_in([*kept, *layout_flags(layout)], layout.ranks) == layout


def test_gpus_that_are_not_a_multiple_of_a_replica_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 GPUs are not a multiple of TP 4 x PP 1"):
        layout_in(["--tensor-model-parallel-size", "4"], 6)
