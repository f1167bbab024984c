"""examples/paper: the grid follows its files, and planted measures yield the right verdicts."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "paper"))
import claims  # noqa: E402
import compare  # noqa: E402
import grid  # noqa: E402
import results  # noqa: E402

TASK = "next_line"


def measured(loss: float, entropy: float, score: float = 0.5) -> dict[str, Any]:
    """Return measures with this loss on every window and about this entropy at layers 0 and 1."""
    rng = np.random.default_rng(round(1000 * (loss + entropy)))
    neurons = {
        f"16/{layer}": {
            "silent": 0.25 * layer,
            "token_entropy": (entropy + 0.1 * rng.standard_normal(200)).tolist(),
        }
        for layer in (0, 1)
    }
    return {
        "losses": [loss * 255] * 40,
        "counts": [255] * 40,
        "tasks": {TASK: {"acc": score, "acc_stderr": 0.01}},
        "training_loss": [[step, 8 - step / 10] for step in range(30)],
        "neurons": neurons,
    }


@pytest.fixture
def variants(tmp_path: Path) -> dict[str, list[grid.Run]]:
    """Return the dense, topk and anneal runs of both seeds."""
    runs = grid.make_grid(tmp_path, "data", fast=False)
    return compare.by_variant([r for r in runs if r.variant in ("dense", "topk", "anneal")])


@pytest.fixture
def measures(variants: dict[str, list[grid.Run]]) -> compare.Measures:
    """TopK is 2 % and 4 % above dense by seed, annealed 1 %; TopK's entropy is 1.5 bits lower."""
    found = {run.name: measured(4.0, 6.0) for run in variants["dense"]}
    for run, percent in zip(variants["topk"], (2, 4), strict=True):
        found[run.name] = measured(4.0 + math.log(1 + percent / 100), 4.5)
    for run in variants["anneal"]:
        found[run.name] = measured(4.0 + math.log(1.01), 6.0)
    return found


def write_claims(study: Path, entries: list[dict[str, Any]]) -> Path:
    study.mkdir()
    (study / "claims.json").write_text(json.dumps(entries))
    return study


def difference(low: float, value: float, high: float) -> dict[str, float]:
    return {"low": low, "value": value, "high": high}


def test_every_variant_is_one_file_with_two_seeds(tmp_path: Path) -> None:
    runs = grid.make_grid(tmp_path, "data", fast=False)
    files = {file.stem for file in (REPOSITORY / "examples/paper/variants").glob("*.args")}
    assert {(run.variant, run.seed) for run in runs} == {(v, s) for v in files for s in (1, 2)}
    assert len({run.directory for run in runs}) == len(runs)
    assert runs[0].variant == "dense"
    assert all(run.about and "\n" not in run.about for run in runs)


def test_the_grid_is_the_one_that_the_paper_needs(tmp_path: Path) -> None:
    topk = {run.variant: run for run in grid.make_grid(tmp_path, "data", fast=False)}
    ks = {run.k for run in topk.values() if "--topk-k" in run.flags}
    assert {256 // k for k in ks} >= {4, 8, 16, 32}
    tails = {run.flag("--topk-layers") for run in topk.values() if "--topk-layers" in run.flags}
    assert tails >= {"none", "all", "all,-1", "all,-2", "all,-3"}
    assert topk["abs"].flag("--topk-mode") == "abs"
    assert topk["mlp"].flag("--topk-site") == "mlp"


@pytest.mark.parametrize("changed", ["data", "steps", "variant"])
def test_what_decides_the_weights_is_in_the_name(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {run.name: run.directory for run in grid.make_grid(tmp_path, "data", fast=False)}
    if changed == "variant":
        copy = tmp_path / "copy"
        (copy / "variants").mkdir(parents=True)
        (copy / "base.args").write_text((grid.HERE / "base.args").read_text())
        (copy / "variants" / "dense.args").write_text("# Dense.\n--topk-layers none --lr 1e-4\n")
        monkeypatch.setattr(grid, "HERE", copy)
    text = "other" if changed == "data" else "data"
    after = grid.make_grid(tmp_path, text, fast=changed == "steps")
    assert after
    assert all(before[run.name] != run.directory for run in after)


def test_the_gap_is_the_mean_over_seeds_with_each_seed_beside_it(
    variants: dict[str, list[grid.Run]], measures: compare.Measures
) -> None:
    found = compare.gap(variants["topk"], variants["dense"], measures)
    assert found.seeds == pytest.approx([2, 4])
    # Geometric mean of 1.02 and 1.04; equal windows leave nothing to resample.
    assert found.percent.value == pytest.approx(100 * (math.sqrt(1.02 * 1.04) - 1))
    assert found.percent.low == pytest.approx(found.percent.high)
    assert compare.gap(variants["dense"], variants["dense"], measures).percent.value == 0


def test_windows_that_differ_widen_the_gap(
    variants: dict[str, list[grid.Run]], measures: compare.Measures
) -> None:
    for run in variants["topk"]:
        noisy = np.array(measures[run.name]["losses"])
        noisy[::2] += 255
        measures[run.name]["losses"] = noisy.tolist()
    found = compare.gap(variants["topk"], variants["dense"], measures).percent
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(100 * (math.sqrt(1.02 * 1.04) * math.exp(0.5) - 1))


def test_other_windows_are_refused(
    variants: dict[str, list[grid.Run]], measures: compare.Measures
) -> None:
    for run in variants["topk"]:
        measures[run.name]["losses"] = [1.0]
    with pytest.raises(SystemExit, match="different text"):
        compare.gap(variants["topk"], variants["dense"], measures)


def test_verdicts_follow_the_numbers(
    variants: dict[str, list[grid.Run]], measures: compare.Measures, tmp_path: Path
) -> None:
    holds = {"id": "track-layers", "holds": True, "difference": difference(0.1, 0.2, 0.3)}
    fails = {"id": "track-layers", "holds": False, "difference": difference(-0.3, -0.2, -0.1)}
    same = {"id": "track-same-neuron", "holds": True, "difference": difference(0.4, 0.5, 0.6)}
    weak = {"id": "steer-1", "holds": False, "difference": difference(-0.01, 0.0, 0.01)}
    strong = {"id": "steer-4", "holds": True, "difference": difference(0.01, 0.02, 0.03)}
    studies = [
        write_claims(tmp_path / "one", [holds, same, weak, strong]),
        write_claims(tmp_path / "two", [fails, same, weak, strong]),
    ]
    found = claims.rows(variants, measures, studies)
    verdicts = {row.claim.split(":")[0]: row for row in found}
    keeps = next(row for row in found if "original performance" in row.claim)
    assert keeps.verdict == claims.YES
    assert keeps.number == "annealed k 1.0 [1.0, 1.0] % above dense; constant k 3.0 [3.0, 3.0] %"
    assert verdicts["A neuron keeps its meaning over training"].verdict == claims.YES
    layers = verdicts["A neuron keeps its meaning from layer to layer"]
    assert layers.verdict == claims.OPEN
    assert layers.number == "0.20 [0.10, 0.30]; -0.20 [-0.30, -0.10]"
    entropy = next(row for row in found if "than a dense model's: token entropy" in row.claim)
    assert entropy.verdict == claims.YES
    assert entropy.number.startswith("-1.5")
    steering = next(row for row in found if row.claim.startswith("Pushing"))
    assert "+2.0 [+1.0, +3.0] points at strength 4" in steering.number


def test_the_page_has_a_row_for_every_variant_and_no_number_without_a_run(
    variants: dict[str, list[grid.Run]], measures: compare.Measures, tmp_path: Path
) -> None:
    runs = [run for some in variants.values() for run in some]
    page = results.write_results(runs, measures, [], tmp_path / "page", "make paper")
    text = page.read_text()
    for variant in variants:
        assert f"| {variant} |" in text
    assert "nan" not in text
    assert {path.name for path in (tmp_path / "page/images").iterdir()} == {
        *("entropy.png", "gap.png", "training.png")
    }
