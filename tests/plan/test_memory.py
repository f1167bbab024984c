"""Memory is compared with Megatron's report, with what autograd saves, and with plain sums."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.plan_memory import GPUS, megatron_memory
from tests.plan.conftest import config_flags
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.saved import SparseSaver
from topk_megatron.parallel.selection import Selection, SelectionRegistry
from topk_megatron.parallel.verify import Verifier
from topk_megatron.plan.command_lines import layout_in, shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.memory import activations, fullest, input_bytes, layer_bytes, memory_of
from topk_megatron.plan.shape import Shape


def difference_explained(shape: Shape, layout: Layout) -> float:
    """Return what the planner counts beyond Megatron's formula on the first stage, term by term.

    Megatron's 18 H + 4 F per token describes GPT-3's layer: as many key and value heads as query
    heads, dropout masks after attention and MLP, no gate. It counts token ids, the mask after the
    embedding, and logits in float32 only.
    """
    layers = shape.stage_layers(layout.pp, 0)
    in_flight = min(layout.microbatches(shape), layout.pp)
    narrow_heads = 2 * (shape.qkv_width + shape.attention_width) - 8 * shape.hidden
    a_layer = narrow_heads + (2 * shape.ffn if shape.gated else 0)
    a_layer -= 0 if shape.dropout else 2 * shape.hidden
    selections = sum(layer in shape.topk.residual_layers for layer in layers) * shape.hidden / 8
    embedding = -8 - (0 if shape.dropout else shape.hidden)
    tokens = layout.tokens(shape)
    logits = 2 * shape.padded(layout.tp) if layout.pp == 1 else 0
    return tokens * (in_flight * (len(layers) * a_layer + selections + embedding) + logits)


@pytest.mark.parametrize("name", GPUS)
def test_megatrons_report_of_the_ladder(name: str) -> None:
    flags = config_flags(name)
    shape, layout = shape_of(flags), layout_in(flags, GPUS[name])
    plan = memory_of(shape, layout, 0)
    states, dense = megatron_memory(flags, GPUS[name])
    # Megatron spreads the final norm of the last stage over all stages.
    norm = shape.hidden / layout.pp if layout.pp > 1 else 0
    assert plan.states + norm * (6 + 12 / layout.dp) == pytest.approx(states, rel=1e-12)
    assert plan.dense == pytest.approx(dense, rel=0.08)
    assert plan.dense - difference_explained(shape, layout) == pytest.approx(dense, rel=1e-9)


@pytest.mark.parametrize("pp", [1, 4])
def test_megatrons_report_of_a_model_with_everything_that_differs(pp: int) -> None:
    flags = (
        "--num-layers 8 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 8 "
        "--seq-length 64 --max-position-embeddings 64 --vocab-size 1000 --micro-batch-size 2 "
        "--global-batch-size 16 --hidden-dropout 0.1 --tensor-model-parallel-size 2 "
        "--sequence-parallel --use-distributed-optimizer --train-iters 1 --lr 1e-3 --bf16 "
        "--position-embedding-type rope --disable-bias-linear --topk-layers 0-2 "
        f"--pipeline-model-parallel-size {pp}"
    ).split()
    shape, layout = shape_of(flags), layout_in(flags, 16)
    states, dense = megatron_memory(flags, 16)
    assert memory_of(shape, layout, 0).states == pytest.approx(states, rel=1e-2)
    ours = activations(shape, layout, 0, sparse=False)
    assert ours - difference_explained(shape, layout) == pytest.approx(dense, rel=1e-9)


def test_full_recompute_keeps_inputs_and_works_on_one_layer(small: Callable[..., Shape]) -> None:
    shape = small("--topk-layers", "0-2")
    layout = Layout(tp=2, pp=2, dp=1, recompute=True)
    tokens = 32 * 2 / 2
    kept = 2 * (4 * 2 * 64)  # two microbatches in flight, four layers, bfloat16
    assert activations(shape, layout, 0, sparse=False) == tokens * (kept + layer_bytes(shape, 0))


def test_later_stages_have_fewer_microbatches_in_flight(small: Callable[..., Shape]) -> None:
    shape, layout = small("--topk-layers", "none"), Layout(tp=1, pp=4, dp=1)
    first, second, third = (activations(shape, layout, stage, sparse=False) for stage in range(3))
    assert (first / 4, second / 3) == (third / 2, third / 2)


def test_few_microbatches_never_fill_the_pipeline(small: Callable[..., Shape]) -> None:
    shape, layout = small("--global-batch-size", "2"), Layout(tp=1, pp=4, dp=1)
    first, second, _ = (activations(shape, layout, stage, sparse=False) for stage in range(3))
    assert first == second


def test_saved_inputs_take_what_the_saver_takes() -> None:
    flags = (
        "--num-layers 4 --hidden-size 2048 --num-attention-heads 8 --seq-length 8 --vocab-size 128 "
        "--max-position-embeddings 8 --topk-k 128"
    )
    shape = shape_of(flags.split())
    layout = Layout(tp=1, pp=1, dp=1, recompute=True)
    saver = SparseSaver(SelectionRegistry(), Verifier(None))
    x = torch.randn(8, 1, 2048, dtype=torch.bfloat16, requires_grad=True)
    output, bits = topk_mask_with_bits(x, 128)
    saver.enter()
    saver.selections.remember(output, Selection(output.shape, 128, bits=bits))
    torch.nn.functional.silu(output)  # saves its input
    saver.leave()
    assert saver.dense_bytes == 8 * input_bytes(shape, layout, 1, sparse=False)
    assert saver.packed_bytes == 8 * input_bytes(shape, layout, 1, sparse=True)


def test_what_a_stage_received_is_sparse_only_if_it_was_sent_sparsely(
    small: Callable[..., Shape],
) -> None:
    shape = small()
    for sparse_p2p in (False, True):
        layout = Layout(tp=1, pp=2, dp=1, recompute=True, sparse_p2p=sparse_p2p, sparse_save=True)
        packed = [
            input_bytes(shape, layout, layer, sparse=True) < 2 * shape.hidden for layer in range(8)
        ]
        # Layer 0 looks the embedding up again, 4 is received, 7 reads a dense layer.
        assert packed == [True, True, True, True, sparse_p2p, True, True, False]


def test_embedding_is_kept_as_ids_unless_dropout_would_draw_again(
    small: Callable[..., Shape],
) -> None:
    layout = Layout(tp=2, pp=1, dp=1, recompute=True, sparse_save=True)
    ids = torch.zeros(2, 32, dtype=torch.long)  # whole on both ranks, and the positions too
    kept = layout.tokens(small()) * input_bytes(small(), layout, 0, sparse=True)
    assert kept == 2 * ids.nbytes
    drawn = small("--hidden-dropout", "0.1")
    assert input_bytes(drawn, layout, 0, sparse=True) == 2 * drawn.hidden
    dense = small("--topk-layers", "none")
    assert input_bytes(dense, layout, 0, sparse=True) == 2 * dense.hidden


def test_fullest_stage_is_the_maximum_over_all(small: Callable[..., Shape]) -> None:
    shape = small("--vocab-size", "500000", "--untie-embeddings-and-output-weights")
    layout = Layout(tp=1, pp=4, dp=2)
    totals = [memory_of(shape, layout, stage).total(sparse_save=False) for stage in range(4)]
    assert fullest(shape, layout).total(sparse_save=False) == max(totals)
    assert fullest(shape, layout).stage == 3  # logits of so many tokens


def test_while_k_anneals_from_the_whole_state_memory_holds_it_densely(
    small: Callable[..., Shape],
) -> None:
    layout = Layout(tp=1, pp=1, dp=1, recompute=True, sparse_save=True)
    flags = ("--topk-anneal", "exponential", "--train-iters", "10")
    whole, part = small(*flags), small(*flags, "--topk-anneal-start-k", "8")
    kept = [input_bytes(shape, layout, 1, sparse=True) for shape in (small(), part, whole)]
    assert kept[0] < kept[1] < kept[2] == 2 * whole.hidden
