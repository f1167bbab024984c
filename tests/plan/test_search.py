"""Every layout is tried, the best is right, and every rejection has a reason."""

from collections.abc import Callable
from itertools import product

import pytest

from tests.plan.conftest import config_flags
from topk_megatron.errors import ConfigError
from topk_megatron.plan.assumptions import USABLE_MEMORY, cluster_of
from topk_megatron.plan.command_lines import layout_in, shape_of
from topk_megatron.plan.search import TIE, Estimate, estimate, search
from topk_megatron.plan.shape import Shape


def cut(one: Estimate) -> tuple[int, int, bool]:
    return one.layout.tp, one.layout.pp, one.layout.recompute


@pytest.mark.parametrize(("nodes", "batch"), [(1, 64), (3, 96), (2, 48)])
def test_every_cut_fits_or_has_a_reason(
    small: Callable[..., Shape], nodes: int, batch: int
) -> None:
    shape = small("--global-batch-size", str(batch), "--micro-batch-size", "1")
    found = search(shape, cluster_of("h100", nodes, 8, "ndr"))
    gpus = 8 * nodes
    possible = {
        (tp, pp, recompute)
        for tp, pp, recompute in product(range(1, 9), range(1, 9), (False, True))
        if 8 % tp == 0 and 8 % pp == 0 and gpus % (tp * pp) == 0
        if batch % (gpus // (tp * pp)) == 0
    }
    assert {cut(one) for one in found.fitting} == possible
    divisors = {1, 2, 4, 8}
    tried = len({(tp, pp) for tp, pp in product(divisors, divisors) if tp * pp <= gpus})
    assert len(found.rejected) == tried - len(possible) / 2


def test_best_is_as_fast_as_any_and_the_simplest_of_those() -> None:
    shape, cluster = shape_of(config_flags("70b")), cluster_of("h100", 64, 8, "ndr")
    found = search(shape, cluster)
    best, rest = found.fitting[0], found.fitting[1:]
    assert best.time.total <= (1 + TIE) * min(one.time.total for one in rest)
    assert [one.time.total for one in rest] == sorted(one.time.total for one in rest)
    assert not best.layout.sparse_p2p  # half a percent over InfiniBand is not a reason


def test_nothing_too_large_is_offered_and_nothing_that_fits_is_left_out() -> None:
    shape, cluster = shape_of(config_flags("70b")), cluster_of("h100", 64, 8, "ndr")
    found = search(shape, cluster)
    assert all(one.bytes <= USABLE_MEMORY.value * 80e9 for one in found.fitting)
    too_large = [one for one in found.rejected if one.kind == "memory"]
    assert too_large
    assert all(one.excess > USABLE_MEMORY.value * 80 for one in too_large)


def test_slow_links_ask_for_sparse_transport() -> None:
    shape = shape_of(config_flags("70b"))
    found = search(shape, cluster_of("h100", 64, 8, "eth100"))
    chosen = {one.layout.pp: one.layout.sparse_p2p for one in found.fitting}
    assert not chosen[1]
    assert all(is_sparse for pp, is_sparse in chosen.items() if pp > 2)


def test_sparse_saving_is_offered_where_nothing_else_fits() -> None:
    shape, cluster = shape_of(config_flags("500b")), cluster_of("h100", 384, 8, "ndr")
    saved = [one for one in search(shape, cluster).fitting if one.layout.sparse_save]
    assert saved
    assert all(one.memory.states + one.memory.dense > cluster.memory for one in saved)


def test_dense_models_are_offered_nothing_sparse() -> None:
    shape = shape_of([*config_flags("70b"), "--topk-layers", "none"])
    for one in search(shape, cluster_of("h100", 64, 8, "eth10")).fitting:
        assert not one.layout.sparse_p2p
        assert not one.layout.sparse_save


def test_model_that_fits_nowhere_says_what_the_nearest_needs() -> None:
    shape = shape_of(config_flags("70b"))
    complaint = (
        r"no layout fits on 8 x h100: the nearest, TP 8, .*, needs \d+\.\d GB per GPU of 72\.0"
    )
    with pytest.raises(ConfigError, match=complaint):
        search(shape, cluster_of("h100", 1, 8, "ndr"))


def test_batch_that_divides_nowhere_is_one_line(small: Callable[..., Shape]) -> None:
    with pytest.raises(ConfigError, match="a batch of 7 is not a multiple of DP 64"):
        search(
            small("--global-batch-size", "7", "--micro-batch-size", "1"),
            cluster_of("h100", 64, 1, "ndr"),
        )


def test_utilization_is_operations_over_the_peak(small: Callable[..., Shape]) -> None:
    shape, cluster = small(), cluster_of("h100", 1, 8, "ndr")
    one = estimate(shape, layout_in([], 8), cluster)
    done = 3 * (8 * shape.layer_flops() + 2 * 1024 * 64) * 64 * 32
    assert one.utilization(shape, cluster) == pytest.approx(done / one.time.total / 8 / 989e12)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gpu": "v100"}, "--gpu v100 is unknown; choose one of a100-40"),
        (
            {"link": "string"},
            "--link string is unknown; choose one of xdr, .* or give GB/s per GPU",
        ),
        ({"link": "-1"}, "--link -1 is unknown"),
        ({"nodes": 0}, "--nodes must be at least 1, got 0"),
        ({"efficiency": 1.5}, "--efficiency is a share of the peak"),
        ({"nvlink": 0.0}, "--nvlink must be above 0 GB/s"),
    ],
)
def test_unknown_hardware_is_one_line(changes: dict[str, object], complaint: str) -> None:
    settings = {"gpu": "h100", "nodes": 1, "gpus_per_node": 8, "link": "ndr", **changes}
    with pytest.raises(ConfigError, match=complaint):
        cluster_of(**settings)  # pyright: ignore[reportArgumentType]


def test_links_can_be_given_in_gigabytes() -> None:
    assert cluster_of("h100", 2, 8, "12.5").between == 12.5e9
    assert cluster_of("h100", 2, 8, "ndr", nvlink=25).inside == 25e9
