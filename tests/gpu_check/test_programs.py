"""The GPU check's programs on a CPU: the work that they would time, and how they compare it."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import baselines, launches, operator_times, tables, train_step, transport
from benchmarks.gpu.timing import Times, Work
from tests.harness.launch import REPOSITORY
from tests.rows import DTYPES, KINDS, MODES, make_rows
from topk_megatron.ops import topk_mask
from topk_megatron.ops.extension import MISSING
from topk_megatron.ops.library import OPS

needs_kernel = pytest.mark.skipif(MISSING["cpu"] is not None, reason="no CPU kernel")


def fake_measure(works: dict[str, Work], *, sets: int, repeats: int) -> dict[str, Times]:
    """Run each work once on every set, and invent its times: a second for each work before it."""
    for work in works.values():
        for number in range(sets):
            work(number)
    return {name: Times(1.0 + n, 1.0 + n, 2.0 + n) for n, name in enumerate(works)}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_times, "DEVICE", "cpu")
    monkeypatch.setattr(operator_times, "SET_BYTES", 1 << 14)
    monkeypatch.setattr(operator_times, "measure", fake_measure)
    without = [b for b in baselines.BASELINES if "compile" not in b.name]  # takes a minute here
    monkeypatch.setattr(baselines, "BASELINES", without)


def test_percentiles_are_of_the_repeats() -> None:
    times = Times.of([float(n) for n in (5, 1, 4, 2, 3, 0, 10, 9, 8, 7, 6)])
    assert (times.median, times.p10, times.p90) == (5, 1, 9)


@pytest.mark.usefixtures("on_cpu")
def test_operator_lines_compare_ideal_bytes_with_the_copy() -> None:
    case = operator_times.Case("bfloat16", 512, 32)
    line = operator_times.operator_line(case)
    assert line["rows"] == 16
    moved = 2 * 2 * 512 + 512 / 8
    # The copy takes an invented second and the forward pass two.
    assert line["forward"]["share_of_copy"] == pytest.approx(moved / (2 * 2 * 512) / 2)
    assert line["copy"]["share_of_copy"] == 1
    assert line["copy_tb_s"] == pytest.approx(16 * 2 * 2 * 512 / 1e12)
    sparse = 32 * (2 + 2)
    assert operator_times.ideal_bytes(case)["unpack"] == sparse + 2 * 512
    assert operator_times.ideal_bytes(case)["pack"] == 32 * 2 + 512 / 8 + sparse


def test_plan_covers_every_kind_mode_and_dtype() -> None:
    plan = operator_times.plan(Namespace(hidden=[4096, 1024], k=None))
    assert {case.kind for case in plan["kinds"]} == set(KINDS)
    cases = [case for cases in plan.values() for case in cases]
    assert {case.mode for case in cases} == set(MODES)
    assert {case.dtype for case in cases} == set(operator_times.DTYPES)
    assert any(case.hidden_size % 8 for case in cases)
    assert plan["sizes"][0].hidden_size == 4096  # the most important first
    chosen = {(case.hidden_size, case.k) for case in plan["sizes"]}
    assert {(4096, 256), (1024, 64)} < chosen


@needs_kernel
@pytest.mark.usefixtures("on_cpu")
def test_a_run_writes_every_case_and_pages_show_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(operator_times.MISSING, "cuda", None)
    options = Namespace(hidden=[4096, 1024], k=None, seconds=500, output=tmp_path / "operator.json")
    operator_times.run(options)
    facts = json.loads(options.output.read_text())
    assert facts["left_out"] == 0
    cases = operator_times.plan(options)
    assert {title: len(lines) for title, lines in facts["tables"].items()} == {
        title: len(lines) for title, lines in cases.items()
    }
    assert facts["headline"].startswith("bfloat16 H = 4096, k = 256, of the copy's")
    page = tables.operator_page(tables.Results(tmp_path))
    assert page.count("\n| bfloat16 |") + page.count("\n| float") == sum(
        len(lines) for title, lines in cases.items() if title != "baselines"
    )
    options.seconds = -1
    operator_times.run(options)
    facts = json.loads(options.output.read_text())
    assert facts["left_out"] == sum(map(len, cases.values()))
    assert "was not measured" in facts["headline"]


@needs_kernel
@pytest.mark.usefixtures("on_cpu")
def test_baselines_that_do_the_same_job_are_verified_and_the_rest_are_named() -> None:
    line = operator_times.baseline_lines(operator_times.Case("float32", 1024, 32))
    remarks = line["remarks"]
    assert set(remarks) == {baseline.name for baseline in baselines.BASELINES}
    for name in ("torch.topk + scatter", "torch.topk + scatter of a mask", "kthvalue + where"):
        assert remarks[name] == "equal on rows without ties"
        assert line[name]["median"] > 0
    for name in ("RTop-K", "FlashInfer top_k", "Transformer Engine fused_topk_with_score_function"):
        assert remarks[name].startswith("absent: ")
        assert name not in line


@needs_kernel
@pytest.mark.usefixtures("on_cpu")
def test_a_baseline_that_fails_on_many_rows_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def small(x: torch.Tensor, k: int) -> torch.Tensor:
        if len(x) < 64:  # `find` tries 64 rows
            raise MemoryError("no workspace")
        return topk_mask(x, k)

    both = [baselines.Baseline(n, "y", lambda f=f: f) for n, f in (("s", small), ("t", topk_mask))]
    monkeypatch.setattr(baselines, "BASELINES", both)
    monkeypatch.setattr(operator_times, "BASELINES", both)
    line = operator_times.baseline_lines(operator_times.Case("float32", 1024, 32))
    assert line["remarks"]["s"] == "absent: fails on 4 rows: MemoryError"
    assert line["t"]["median"] > 0
    assert "s" not in line


def test_a_baseline_that_selects_something_else_is_not_timed() -> None:
    wrong = baselines.Baseline("wrong", "y", lambda: lambda x, k: topk_mask(-x, k))
    x = baselines.distinct_rows(4, 64, torch.float32, "cpu")
    with pytest.raises(baselines.Absent, match="differs from the operator's"):
        baselines.check(wrong, wrong.load(), x, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_for_comparison_have_no_ties(dtype: torch.dtype) -> None:
    x = baselines.distinct_rows(3, 4096, dtype, "cpu")
    assert x.isfinite().all()
    assert all(len(row.unique()) == 4096 for row in x)


@needs_kernel
def test_launches_reach_every_dtype_mode_and_length_and_equal_the_definition() -> None:
    cases = list(launches.cases(quick=True))
    assert {case[:3] for case in cases} == {
        (width, dtype, mode)
        for width in launches.WIDTHS
        for dtype in launches.DTYPES
        for mode in MODES
    }
    assert launches.launch_every("cpu", quick=True) == len(cases)
    assert len(list(launches.cases(quick=False))) > 3 * len(cases)


@needs_kernel
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("topk_mask_backward", lambda dy, bits: -OPS.topk_mask_backward(dy, bits)),
        ("count_bits", lambda bits, width: OPS.count_bits(bits, width) + 1),
    ],
)
def test_launches_notice_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., torch.Tensor]
) -> None:
    right = {op: getattr(OPS, op) for op in ("topk_mask", "topk_mask_backward", "count_bits")}
    monkeypatch.setattr(launches, "OPS", SimpleNamespace(**{**right, name: wrong}))
    with pytest.raises(SystemExit, match="differs"):
        launches.launch_every("cpu", quick=True)


def test_profiled_works_are_six_with_their_ideal_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    launches.launch_profiled("cpu", 1 << 20)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2].split()[0] for line in lines].count("forward") == 4
    assert {line[2].split()[0] for line in lines} == {"forward", "backward", "unpack"}
    forward = next(line for line in lines if line[2] == "forward bfloat16 H = 4096, k = 256")
    assert int(forward[3]) == (1 << 20) * 2 + (1 << 20) // 2 // 8


@pytest.mark.parametrize("shape", transport.SHAPES)
def test_transport_brings_every_bit_back(shape: tuple[int, int]) -> None:
    assert transport.loop("cpu", *shape, rows=20)
    fake_measure(transport.works_of("cpu", *shape, 20, 2), sets=2, repeats=1)


def test_transport_notices_a_lost_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = transport.wire.unpack_hidden

    def lossy(format: Any, message: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        indices = unpack(format, message, out)
        out.view(torch.int16)[0, 0] ^= 1
        return indices

    monkeypatch.setattr(transport.wire, "unpack_hidden", lossy)
    assert not transport.loop("cpu", 2048, 128, rows=4)


def test_paired_differences_have_an_interval_that_holds_the_truth() -> None:
    random = np.random.default_rng(1)
    noise = random.normal(0, 5, 200)  # common to both of a pair
    times = {"dense": list(100 + noise), "topk": list(101 + noise + random.normal(0, 0.5, 200))}
    found = train_step.compare(times, "topk", "dense")
    low, high = found["interval"]
    assert low < 0.01 < high
    assert high - low < 0.003
    assert found["mean"] == pytest.approx(0.01, abs=0.002)


@pytest.mark.slow
def test_training_step_runs_all_three_models(tmp_path: Any) -> None:
    output = tmp_path / "step.json"
    sizes = "--layers 2 --hidden-size 64 --ffn-hidden-size 128 --heads 4 --groups 2 --k 8"
    sizes += " --seq-length 32 --vocab-size 512 --seconds 0"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.train_step", *sizes.split(), "--output", output],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(output.read_text())
    assert set(facts["variants"]) == set(train_step.VARIANTS)
    losses = {name: variant["loss"] for name, variant in facts["variants"].items()}
    assert losses["topk"] == losses["topk, no statistics"] != losses["dense"]
    assert facts["rounds"] == 2
    assert "only 2 rounds" in facts["headline"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_drawn_on_a_named_device_are_the_same(kind: str, dtype: torch.dtype) -> None:
    x = make_rows(kind, (3, 33), dtype, device="cpu")
    assert torch.equal(x.nan_to_num(7), make_rows(kind, (3, 33), dtype).nan_to_num(7))
