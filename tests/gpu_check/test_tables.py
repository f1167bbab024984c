"""The tables of a GPU check, made from invented numbers: none of these was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import counters, predictions, pretrain, tables

TIMES = {"median": 10.0, "p10": 9.0, "p90": 12.0}


def invented_line(dtype: str, hidden_size: int, k: int, kind: str, share: float) -> dict[str, Any]:
    works = {work: {**TIMES, "share_of_copy": share} for work in ("copy", *tables.WORKS)}
    shape = {"dtype": dtype, "hidden_size": hidden_size, "k": k, "mode": "value", "kind": kind}
    return {**shape, "rows": 5, "copy_tb_s": 3.0, **works}


def invented_facts() -> dict[str, dict[str, Any]]:
    shapes = [(2048, 128), (4096, 256), (8192, 512)]
    sizes = [invented_line("bfloat16", *shape, "normal", 0.87) for shape in shapes]
    sizes.append(invented_line("float32", 4096, 256, "normal", 0.5))
    kinds = [invented_line("bfloat16", 4096, 256, kind, 0.9) for kind in ("normal", "relu")]
    kinds[1]["forward"] = {**TIMES, "median": 15.0, "share_of_copy": 0.6}
    baselines = invented_line("bfloat16", 4096, 256, "normal", 0.9)
    baselines["torch.topk + scatter"] = {**TIMES, "median": 70.0}
    remarks = {"torch.topk + scatter": "equal on rows without ties", "RTop-K": "absent: no module"}
    baselines |= {"remarks": remarks, "jobs": dict.fromkeys(remarks, "y")}
    step = {"ms": 40.0, "p10_ms": 39.0, "p90_ms": 41.0, "tokens_per_second": 1e5, "loss": 10.4}
    pair = {"of": "topk", "over": "dense", "mean": 0.02, "interval": [0.01, 0.03]}
    run = {"steps": 2, "step_ms": 5.0, "tokens_per_second": 2e5, "announced": ["topk_megatron: x"]}
    us = {"dense copy": 1.0, "pack": 2.0}
    transport = {"hidden_size": 4096, "k": 256, "rows": 9, "equal": True, "us": us}
    return {
        "machine": {
            "headline": "an invented card",
            "date": "2000-01-01",
            "card": {"name": "an invented card", "driver_version": "1.2", "clocks.sm": "3 MHz"},
            "packages": {"torch": "2.11.0"},
            "cuda": "13.0",
            "command": "scripts/gpu_check.sh",
        },
        "oracle": {"headline": "equal", "differences": []},
        "operator": {
            "headline": "forward 87%",
            "left_out": 3,
            "tables": {"sizes": sizes, "kinds": kinds, "baselines": [baselines]},
        },
        "transport": {"shapes": [{**transport, "message_bytes": 1, "dense_bytes": 8}]},
        "train_step": {
            "rounds": 50,
            "sizes": {"layers": 4},
            "attention": "Attention",
            "variants": {"dense": {**step, "peak_gib_above_weights": 1.5}},
            "differences": [pair],
        },
        "training": {"runs": {"topk": {**run, "losses": [[1, 9.5], [2, 7.0]]}}},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, facts in invented_facts().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    steps = ["machine\tok\t2\t10", "oracle\tok\t9\t45", "operator\tok\t50\t70"]
    steps += ["racecheck\tskipped: compute-sanitizer is not on this machine\t0\t30"]
    steps += ["memcheck\tfailed (9)\t12\t35"]
    (tmp_path / "steps.tsv").write_text("\n".join(steps) + "\n")
    (tmp_path / "memcheck.log").write_text("a | b\n========= ERROR SUMMARY: 2 errors\n\n")
    return tmp_path


def test_pages_hold_the_numbers_and_name_the_machine(folder: Path) -> None:
    results = tables.Results(folder)
    operator = tables.operator_page(results)
    assert "an invented card, driver 1.2; torch 2.11.0, CUDA 13.0" in operator
    assert "SM 3 MHz" in operator
    assert "| bfloat16 | 4096 | 256 | value | normal | 3.00 | 10.0 [9.0, 12.0], 87% |" in operator
    assert "| torch.topk + scatter | y | 70.0 [9.0, 12.0] | 7.00 | equal on rows" in operator
    assert "| RTop-K | y | — |  | absent: no module |" in operator
    assert "3 cases were left out" in operator
    assert "Other people's numbers" in operator
    assert "No counters were read." in operator
    assert "| 4096 | 256 | 9 | 0.125 | yes | 1.0 | 2.0 |" in operator
    step = tables.train_page(results)
    assert "| topk over dense | +2.00% | [+1.00%, +3.00%] |" in step
    assert "| topk | 2 | 5.0 | 200,000 | 9.5000 | 7.0000 |" in step
    assert "## pretrain_topk_gpt.py, mock data\n\nIt was not run." in step


def test_summary_shows_headlines_and_the_last_words_of_failures(folder: Path) -> None:
    summary = tables.steps_table(tables.Results(folder))
    assert "| operator | ok | 50 of 70 | forward 87% |" in summary
    assert "| memcheck | failed (9) | 12 of 35 | ========= ERROR SUMMARY: 2 errors |" in summary
    assert "| racecheck | skipped: compute-sanitizer is not" in summary


def test_predictions_are_judged_by_what_was_measured(folder: Path) -> None:
    page = tables.checks_page(tables.Results(folder))
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    assert "| at least 0.85 | 0.87 | yes |" in lines["forward, bfloat16, H = 4096, k = 256"]
    assert "| at least 0.9 | 0.5 | NO |" in lines["forward, float32, H = 4096, k = 256"]
    assert "| 0 | 0 | yes |" in lines["rows that differ from the oracle on the device"]
    assert "| 1 | 0 | NO |" in lines["memcheck, over every kernel"]
    assert "not measured" in lines["racecheck, over every kernel"]
    assert "| at most 0.01 | 0.02 | NO |" in lines["TopK over dense, forward and backward, share"]
    assert "| 2.5 | yes |" in lines["fall of the loss on real text, nats per token"]
    assert "| at most 1.5 | 1.5 | yes |" in page
    assert "| at least 5 | 7 | yes |" in page


def test_every_prediction_has_a_known_key_and_a_reason() -> None:
    found = predictions.read_predictions()
    rows = predictions.PAGE.read_text().count("| `")
    assert len(found) == rows > 20
    for prediction in found:
        name = prediction.key.split(":")[0]
        assert name in {*predictions.MEASURED, "passed"}, name
        assert len(prediction.reason) > 20


def test_an_empty_folder_gives_pages_that_say_so(tmp_path: Path) -> None:
    results = tables.Results(tmp_path)
    assert "The operator was not timed." in tables.operator_page(results)
    assert "The training step was not timed." in tables.train_page(results)
    assert "no card was read" in tables.checks_page(results)
    assert " yes |" not in tables.checks_page(results)


def test_a_json_file_that_was_cut_off_is_named(folder: Path) -> None:
    (folder / "operator.json").write_text('{"tables": {"si')
    results = tables.Results(folder)
    assert "operator.json is incomplete" in tables.steps_table(results)
    assert "The operator was not timed." in tables.operator_page(results)


def ncu_text(metrics: tuple[str, ...] = counters.METRICS) -> str:
    """Imitate ncu's raw page: messages, labels, a header, a row of units, launches."""

    def row(number: str, name: str, values: dict[str, str]) -> str:
        return ",".join(f'"{x}"' for x in (number, name, *(values.get(m, "") for m in metrics)))

    time, read, written = counters.TIME, counters.READ, counters.WRITTEN
    alu = counters.PERCENTAGES["alu"]
    header = row("ID", "Kernel Name", {m: m for m in metrics})
    launches = [
        ("erfinv_kernel", {time: "1"}),
        ("topk_mask_forward<2>", {time: "1,000", read: "600", written: "450", alu: "80"}),
        ("erfinv_kernel", {time: "1"}),
        ("fill", {time: "300", read: "0", written: "50", alu: "10"}),
        ("scatter", {time: "100", read: "20", written: "30", alu: "50"}),
    ]
    rows = [row(str(n), name, values) for n, (name, values) in enumerate(launches)]
    labels = ["LAUNCH\t0\tforward bfloat16 H = 4096, k = 256\t1000", "LAUNCH\t1\tunpack x\t80"]
    units = row("", "", dict.fromkeys(metrics, "byte"))
    return "\n".join(["==PROF== Connected", header, units, *rows[:2], *labels, *rows[2:], "done"])


def test_counters_of_several_kernels_are_summed_and_weighted_by_time() -> None:
    forward, unpack = counters.parse(ncu_text())
    assert forward["bytes_over_ideal"] == pytest.approx(1.05)
    assert (forward["kernels"], forward["ns"], forward["alu_pct"]) == (1, 1000, 80)
    assert unpack["bytes_over_ideal"] == pytest.approx(100 / 80)
    assert (unpack["kernels"], unpack["ns"], unpack["alu_pct"]) == (2, 400, 20)
    assert "issue_pct" not in forward  # its cells were empty
    assert counters.headline([forward, unpack]).startswith(
        "forward bfloat16 H = 4096, k = 256: 1.05"
    )
    shown = tables.counter_table({"works": [forward, unpack], "unknown_metrics": ["x.sum"]})
    assert "| unpack x | 2 | 0.4 | 1.250 |" in shown
    assert "does not know x.sum" in shown


def test_counters_without_a_table_or_with_a_lost_work_are_refused() -> None:
    with pytest.raises(SystemExit, match="no table"):
        counters.parse("==ERROR== no permission")
    lost = ncu_text().replace("LAUNCH\t1\tunpack x\t80\n", "")
    with pytest.raises(SystemExit, match="1 works were launched, and ncu shows 2"):
        counters.parse(lost)


def test_a_counter_that_ncu_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = counters.INSTRUCTIONS["fp16"]
    (tmp_path / "text").write_text(ncu_text(tuple(m for m in counters.METRICS if m != gone)))
    ncu = tmp_path / "ncu"
    ncu.write_text(
        f'#!/bin/bash\n[[ "$*" != *{gone}* ]] || {{ echo "==ERROR== Failed to find metric {gone}"'
        f' >&2; exit 1; }}\ncat "{tmp_path}/text"\n'
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    text, unknown = counters.profile(tmp_path / "raw.txt")
    assert unknown == [gone]
    assert len(counters.parse(text)) == 2


LOG = (
    " [2000-01-01 00:00:00] iteration        {n}/     400 | consumed samples:            4 |"
    " elapsed time per iteration (ms): {ms} | learning rate: 1.0E-04 | global batch size:     4 |"
    " lm loss: {loss}E+00 | loss scale: 1.0 |"
)


def test_pretraining_log_gives_losses_and_the_settled_time() -> None:
    lines = [LOG.format(n=n, ms=9000.5 if n < 4 else 50.0, loss=10 - n) for n in range(1, 8)]
    text = "topk_megatron: layers: Megatron's own\n" + "\n".join(lines)
    found = pretrain.summarise(text, tokens_per_step=1000)
    assert found["steps"] == 7
    assert found["step_ms"] == 50.0
    assert found["tokens_per_second"] == pytest.approx(20_000)
    assert found["losses"][0] == [1, 9.0]
    assert found["announced"] == ["topk_megatron: layers: Megatron's own"]


def test_pretraining_without_a_step_shows_the_end_of_its_log() -> None:
    with pytest.raises(SystemExit, match=r"no step was logged; the log ends: one \| out of memory"):
        pretrain.summarise("one\nout of memory\n", tokens_per_step=1)
