"""examples/ladder: one dial decides all sizes, and a killed training ends like any other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.ladder import grid, rungs, training
from examples.ladder.text import REPOSITORY
from tests.ladder.train_tiny import make_run
from topk_megatron.files import read_scalars


def make(directory: Path, *, data: str = "data", seeds: tuple[int, ...] = (1,)) -> list[grid.Run]:
    return grid.make_grid(directory, data, [4, 6], ["dense", "anneal"], seeds)


def test_five_rungs_span_the_sizes_that_two_cores_can_train() -> None:
    sizes = [rung.parameters for rung in rungs.RUNGS.values()]
    assert len(sizes) >= 5
    assert sizes == sorted(sizes)
    assert sizes[0] == pytest.approx(0.2e6, rel=0.1)
    assert 5e6 < sizes[-1] < 7e6


@pytest.mark.parametrize("depth", rungs.RUNGS)
def test_every_branch_begins_and_ends_on_a_checkpoint_that_is_kept(depth: int) -> None:
    rung = rungs.RUNGS[depth]
    every = rung.steps // training.SAVES
    assert every * training.SAVES == rung.steps
    for leg in grid.Run(rung, "dense", "", 1, (), Path()).legs()[1:]:
        start = leg.steps - leg.cooldown
        assert start % (training.KEPT * every) == 0
        assert rung.tokens(leg.fraction) == leg.steps * rung.batch * rungs.SEQUENCE


def test_the_parameters_and_operations_are_those_of_the_model() -> None:
    """Depth 4: attention has 4 matrices of 128 x 32, the gated MLP 3 of 128 x 88."""
    rung = rungs.RUNGS[4]
    assert rung.parameters == 4 * (4 * 128 * 32 + 3 * 128 * 88)
    # Each layer: 6 for each weight; scores and values over 128 tokens on average.
    output = 6 * rungs.VOCABULARY * 128
    assert rung.flops_per_token == 6 * rung.parameters + output + 4 * 6 * 2 * 128 * 32


@given(st.integers(1, 500), st.integers(1, 64), st.sampled_from([4, 6, 8]))
def test_a_variants_expressions_follow_the_rung(times: int, by: int, depth: int) -> None:
    rung = rungs.RUNGS[depth]
    text = rung.fill_in(f"--a {{H*{times}/{by}}} --b {{S/{by}}} {{D-1}} c")
    assert text.split() == [
        *("--a", str(round(32 * depth * times / by)), "--b", str(round(rung.steps / by))),
        *(str(depth - 1), "c"),
    ]


@pytest.mark.parametrize("text", ["{H**2}", "{open('x')}", "{Q}", "{}", "{H.real}", "{'a'*3}"])
def test_an_expression_computes_and_does_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected numbers|cannot read"):
        rungs.RUNGS[4].fill_in(text)


def test_runs_differ_in_their_folder_and_the_cheapest_come_first(tmp_path: Path) -> None:
    runs = make(tmp_path, seeds=(1, 2))
    assert [run.name for run in runs[:4]] == [
        *("4-dense-seed-1", "4-anneal-seed-1", "4-dense-seed-2", "4-anneal-seed-2")
    ]
    assert len({run.directory for run in runs}) == len(runs)
    assert runs[1].k == 8
    assert runs[0].k == 8
    assert not any("{" in flag for run in runs for flag in run.flags)


@pytest.mark.parametrize("changed", ["data", "flags", "cooldown", "branches"])
def test_what_decides_the_weights_is_in_the_name(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {run.name: run.directory for run in make(tmp_path)}
    if changed == "cooldown":
        monkeypatch.setattr(grid, "COOLDOWN", 0.1)
    if changed == "branches":
        monkeypatch.setattr(grid, "BRANCHES", (0.1,))
    if changed == "flags":
        monkeypatch.setattr(grid, "read_flags", lambda _: ["--lr", "1"])
    after = make(tmp_path, data="other" if changed == "data" else "data")
    assert after
    assert all(before[run.name] != run.directory for run in after)


@pytest.mark.parametrize(("depths", "variants"), [([5], ["dense"]), ([4], ["nothing"])])
def test_an_unknown_rung_or_variant_ends_in_one_line(
    depths: list[int], variants: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: expected (depths|variants) of .*, got"):
        grid.make_grid(tmp_path, "data", depths, variants, [1])


def test_the_time_of_a_training_leaves_out_interruptions(tmp_path: Path) -> None:
    """Steps 1 to 40 took 1 s each; after a restart from step 36, steps 37 to 40 took 2 s each."""
    run = grid.Run(rungs.RUNGS[4], "dense", "", 1, (), tmp_path)
    leg = run.legs()[0]
    leg.directory.mkdir()
    line = " iteration {:8d}/ 960 | consumed | elapsed time per iteration (ms): {:.1f} | loss\n"
    steps = [(1, 1000), (20, 1000), (40, 1000), (37, 2000), (40, 2000), (60, 2000)]
    (leg.directory / "train.log").write_text("".join(line.format(*step) for step in steps))
    assert training.seconds_of(leg) == pytest.approx(40 + 4 * 2 + 20 * 2)


def start_tiny(directory: Path, corpus: Path, tokenizer: Path) -> "subprocess.Popen[bytes]":
    """Start to train and measure the tiny run, as a job that can be killed as a whole."""
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer, data / "tokenizer.model")
    command = [sys.executable, "-m", "tests.ladder.train_tiny", directory, f"{corpus}/*.txt"]
    return subprocess.Popen([*command, "anneal"], cwd=REPOSITORY, start_new_session=True)


@pytest.mark.slow
def test_a_training_that_is_killed_ends_like_one_that_is_not(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_tiny(whole, corpus, tokenizer).wait() == 0
    job = start_tiny(killed, corpus, tokenizer)
    leg = make_run(killed, "anneal").legs()[0]
    later = [leg.checkpoints / f"iter_{step:07d}" for step in range(12, leg.steps, 4)]
    deadline = time.monotonic() + 120
    while not any(path.exists() for path in later):
        assert job.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (leg.directory / "trained.json").exists()
    assert start_tiny(killed, corpus, tokenizer).wait() == 0

    log = (leg.directory / "train.log").read_text()
    assert log.count("iteration        1/") == 1, "the second start began from scratch"
    one, other = (
        json.loads(next((directory / "results").glob("*.json")).read_text())
        for directory in (whole, killed)
    )
    for found in (one, other):
        for part in found["legs"]:
            assert part.pop("seconds") > 0
    assert one == other
    losses = {part["fraction"]: part["loss"] for part in one["legs"]}
    assert losses.keys() == {1.0, 0.25, 0.5}
    assert losses[1.0] < losses[0.5] < losses[0.25]
    steps = read_scalars(leg.directory / "tensorboard", "learning-rate")
    assert max(steps) == leg.steps
    assert steps[leg.steps - leg.cooldown] == pytest.approx(4e-3)
    assert steps[leg.steps] == pytest.approx(0, abs=1e-9)
    (neurons,) = one["neurons"].values()
    assert sum(neurons["activations"]) == one["k"] * one["tokens"] == 6 * one["tokens"]
    shares = np.array(neurons["activations"]) / sum(neurons["activations"])
    # k neurons of H tell at most log2(H / k) bits about the token (docs/design/0013-tax.md).
    mean = shares @ np.array(neurons["token_entropy"])
    assert one["entropy_of_tokens"] - np.log2(96 / 6) - 0.1 < mean < one["entropy_of_tokens"]
