"""Bytes and seconds are compared with real messages, a simulated pipeline and published runs."""

from collections.abc import Callable

import pytest
import torch

from tests.plan.conftest import config_flags
from tests.plan.published import MODELS, Published, published_shape
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.parallel.wire import pack_gradient, pack_hidden
from topk_megatron.plan.assumptions import LINK_EFFICIENCY, Cluster, cluster_of
from topk_megatron.plan.command_lines import shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.memory import wire_of
from topk_megatron.plan.search import estimate
from topk_megatron.plan.shape import Shape
from topk_megatron.plan.step_time import compute_seconds, step_time, transport_seconds
from topk_megatron.plan.traffic import message_bytes, tensor_bytes, traffic_of


def h100s(nodes: int, link: str = "ndr") -> Cluster:
    return cluster_of("h100", nodes, 8, link)


def test_sparse_messages_have_the_size_of_real_ones() -> None:
    shape = shape_of([*config_flags("1b"), "--seq-length", "16", "--micro-batch-size", "2"])
    layout = Layout(tp=2, pp=4, dp=1)
    wire = wire_of(shape)
    assert wire is not None
    x = torch.randn(16, 1, shape.hidden, dtype=torch.bfloat16)
    output, bits = topk_mask_with_bits(x, shape.topk.k)
    message, indices = pack_hidden(wire, output, bits)
    gradient = pack_gradient(x, indices)
    assert message_bytes(shape, layout, 0, sparse=True) == (message.numel(), gradient.numel())
    assert message_bytes(shape, layout, 0, sparse=False) == (x.nbytes, x.nbytes)


def test_boundary_after_a_dense_layer_stays_dense(small: Callable[..., Shape]) -> None:
    shape, layout = small("--topk-layers", "0-2"), Layout(tp=1, pp=4, dp=1)
    sizes = [[message_bytes(shape, layout, b, sparse=s) for b in range(3)] for s in (False, True)]
    assert sizes[0][0] > sizes[1][0]  # after layer 1
    assert sizes[0][1:] == sizes[1][1:]  # after layers 3 and 5


def test_tensor_parallel_bytes_are_those_of_the_collectives(small: Callable[..., Shape]) -> None:
    shape = small()
    state = 32 * 2 * 64 * 2  # s b H in bfloat16; a collective moves three quarters of it at TP 4
    plain, again = Layout(tp=4, pp=2, dp=1), Layout(tp=4, pp=2, dp=1, recompute=True)
    assert tensor_bytes(shape, plain) == 10 * state * 3 / 4
    assert tensor_bytes(shape, plain, exposed=True) == 8 * state * 3 / 4
    assert tensor_bytes(shape, again) == 14 * state * 3 / 4
    assert traffic_of(shape, plain).tensor == 32 * 4 * tensor_bytes(shape, plain)
    assert tensor_bytes(shape, Layout(tp=1, pp=2, dp=4)) == 0


def test_data_parallel_bytes_are_gradients_and_weights_once_per_step(
    small: Callable[..., Shape],
) -> None:
    shape = small()
    traffic = traffic_of(shape, Layout(tp=1, pp=1, dp=4))
    assert traffic.gradients == 4 * shape.parameters * 3 / 4
    assert traffic.weights == 2 * shape.parameters * 3 / 4
    assert traffic_of(shape, Layout(tp=1, pp=1, dp=1)).data == 0


def test_middle_stage_sends_most(small: Callable[..., Shape]) -> None:
    shape = small("--topk-layers", "none")
    one_way = 32 * 2 * 64 * 2
    assert traffic_of(shape, Layout(tp=1, pp=2, dp=1)).pipeline_dense == 32 * one_way
    assert traffic_of(shape, Layout(tp=1, pp=4, dp=1)).pipeline_dense == 32 * 2 * one_way


def simulated(forward: list[float], backward: list[float], count: int) -> float:
    """Return the seconds of 1F1B, event by event: a stage starts as soon as its input is there."""
    stages = len(forward)
    orders = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, count)
        steady = [(kind, i) for i in range(count - warm_up) for kind in "fb"]
        order = [("f", i) for i in range(warm_up)]
        order += [(kind, i + warm_up) if kind == "f" else (kind, i) for kind, i in steady]
        orders.append(order + [("b", i) for i in range(count - warm_up, count)])
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * stages, [0] * stages
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                kind, i = orders[stage][position[stage]]
                edge = 0 if kind == "f" else stages - 1
                source = stage - 1 if kind == "f" else stage + 1
                ready = 0.0 if stage == edge else done.get((kind, i, source))
                if ready is None:
                    break
                cost = forward[stage] if kind == "f" else backward[stage]
                clock[stage] = done[kind, i, stage] = max(clock[stage], ready) + cost
                position[stage] += 1
    return max(clock)


@pytest.mark.parametrize(("pp", "count"), [(1, 8), (2, 8), (4, 4), (8, 64)])
def test_pipeline_takes_as_long_as_a_simulated_one(
    small: Callable[..., Shape], pp: int, count: int
) -> None:
    shape = small("--topk-layers", "none", "--global-batch-size", str(2 * count))
    layout = Layout(tp=1, pp=pp, dp=1)
    cluster = cluster_of("h100", 1, 8, "ndr", nvlink=1e9)  # transport costs nothing
    times = [compute_seconds(shape, layout, cluster, stage) for stage in range(pp)]
    expected = simulated([t / 3 for t in times], [2 * t / 3 for t in times], count)
    found = step_time(shape, layout, cluster, traffic_of(shape, layout)).total
    assert found == pytest.approx(expected, rel=1e-6)


def test_transport_adds_its_time_to_every_microbatch(small: Callable[..., Shape]) -> None:
    shape, layout = small("--topk-layers", "none"), Layout(tp=1, pp=8, dp=2)
    cluster = h100s(2, "eth10")
    both_ways = 2 * 2 * 32 * 2 * 64
    seconds = both_ways / (LINK_EFFICIENCY.value * 1.25e9 / 8)
    assert transport_seconds(shape, layout, cluster, sparse=False) == pytest.approx(seconds)
    time = step_time(shape, layout, cluster, traffic_of(shape, layout))
    assert time.transport == pytest.approx(16 * seconds)


@pytest.mark.parametrize("link", ["eth100", "ndr"])
def test_sparse_transport_pays_on_slow_links_only(link: str) -> None:
    shape, layout = shape_of(config_flags("7b")), Layout(tp=8, pp=4, dp=1)
    dense, sparse = (
        transport_seconds(shape, layout, h100s(4, link), sparse=sparse) for sparse in (False, True)
    )
    compute = compute_seconds(shape, layout, h100s(4), stage=1)
    assert (dense - sparse > 0.1 * compute) == (link == "eth100")


def test_everything_inside_a_node_takes_its_links(small: Callable[..., Shape]) -> None:
    shape, layout = small(), Layout(tp=2, pp=2, dp=2)
    fast, slow = h100s(1), h100s(1, "eth10")
    times = [step_time(shape, layout, c, traffic_of(shape, layout)) for c in (fast, slow)]
    assert times[0] == times[1]


def test_replicas_of_a_node_share_its_ports() -> None:
    cluster = h100s(4)
    alone = cluster.seconds(1e9, inside=False)
    assert cluster.seconds(1e9, inside=False, ports=8) == pytest.approx(alone / 8)
    assert cluster.seconds(1e9, inside=False, ports=100) == cluster.seconds(1e9, inside=True)


def test_packing_costs_its_passes_and_launches(small: Callable[..., Shape]) -> None:
    shape, layout, cluster = small(), Layout(tp=1, pp=2, dp=8), h100s(2)
    dense, messages = 2 * 64 * 64, message_bytes(shape, layout, 0, sparse=True)
    packing = 2 * (4 * dense / (0.6 * 3.35e12) + 50e-6)
    expected = sum(messages) / (LINK_EFFICIENCY.value * 50e9) + packing
    assert transport_seconds(shape, layout, cluster, sparse=True) == pytest.approx(expected)


@pytest.mark.parametrize(("link", "is_hidden"), [("xdr", True), ("eth100", False)])
def test_data_parallel_traffic_hides_behind_one_microbatch(link: str, is_hidden: bool) -> None:
    shape, layout, cluster = shape_of(config_flags("1b")), Layout(tp=1, pp=1, dp=32), h100s(4, link)
    traffic = traffic_of(shape, layout)
    time = step_time(shape, layout, cluster, traffic)
    microbatch = (time.compute + time.topk) / layout.microbatches(shape)
    node = 8 * cluster.between * LINK_EFFICIENCY.value  # a ring leaves a node through all its ports
    late = traffic.gradients / node - 2 / 3 * microbatch, traffic.weights / node - microbatch / 3
    assert time.data == pytest.approx(sum(max(0.0, seconds) for seconds in late))
    assert (time.data == 0) == is_hidden


def test_recompute_costs_a_third_more_of_the_layers(small: Callable[..., Shape]) -> None:
    shape, cluster = small(), h100s(1)
    plain, again = (
        compute_seconds(shape, Layout(tp=1, pp=2, dp=1, recompute=r), cluster, 0)
        for r in (False, True)
    )
    assert again == pytest.approx(4 / 3 * plain)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.billions}B")
def test_published_runs_come_out_within_a_quarter(model: Published) -> None:
    cluster = cluster_of("a100-80", model.gpus // 8, 8, "hdr")
    dp = model.gpus // (model.tp * model.pp)
    layout = Layout(tp=model.tp, pp=model.pp, dp=dp, recompute=True)
    found = estimate(published_shape(model), layout, cluster)
    teraflops = model.operations() / found.time.total / model.gpus / 1e12
    assert teraflops == pytest.approx(model.teraflops, rel=0.25)
