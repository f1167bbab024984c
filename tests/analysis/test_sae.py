"""The SAE baseline: training, recording its latents, matching."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.analysis.planted import analyze, assert_one_error
from topk_megatron.analysis.sae.results import MatchConfig, match_layer
from topk_megatron.analysis.sae.training import (
    SAETraining,
    load_saes,
    sae_directory,
    train_sae,
)
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.study import open_run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.hf.model import open_model

pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def study(dense_folder: Path, token_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    flags = ["--model", dense_folder, "--study", directory, "--corpus", token_corpus]
    flags += ["--k", 4, "--layers", "0-1", "--train-tokens", 40000, "--min-count", 10]
    with pytest.MonkeyPatch.context() as patch:
        code, out, err = analyze(patch, "sae", *flags)
    assert code == 0, err
    assert "SAE latents, two seeds" in out
    return directory


def test_recorded_latents_are_the_saes_own(
    study: Path, dense_folder: Path, token_corpus: Path
) -> None:
    folder = open_model(dense_folder)
    places = [sae_directory(study, layer, 0) for layer in (0, 1)]
    source = make_source(folder, sae=places)
    tokens = torch.arange(2, 34)[None]
    found = source.states(tokens)
    saes, described = load_saes(places)
    assert described["seed"] == 0
    with torch.no_grad():
        hidden = folder.model(tokens, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            expected = saes[layer].encode(hidden[layer + 1][0])
            values, neurons = found[layer]
            dense = torch.zeros_like(expected).scatter(1, neurons.long(), values)
            torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
            assert (expected != 0).sum(dim=1).max() <= 4


def test_quality_and_training_are_written(study: Path) -> None:
    quality = read_table(study / "sae" / "quality.parquet").to_pandas()
    assert len(quality) == 4
    assert quality["l0"].between(0.1, 4).all()
    assert (quality["loss"] != quality["loss_without"]).all()
    training = read_table(study / "sae" / "training.parquet").to_pandas()
    for _, one in training.groupby(["layer", "seed"]):
        assert one["tokens"].is_monotonic_increasing
        assert one["mse"].iloc[-1] < one["mse"].iloc[0]


def test_a_run_matched_with_itself_matches_everywhere(study: Path) -> None:
    run = open_run(study, "sae-seed-0")
    decoder = np.eye(32)
    found = match_layer(MatchConfig(), run, run, 0, (decoder, decoder[::-1]))
    live = run.histogram(0).totals > 0
    # Two latents can have the very same tokens; the lower number is then taken.
    assert found["matched"][live].mean() > 0.9
    assert (found["decoder_cosine"] == 1).all()
    assert not found["matched"][~live].any()


def test_shares_are_means_over_the_active_latents(study: Path) -> None:
    matches = read_table(study / "sae" / "matches.parquet").to_pandas()
    summary = read_table(study / "sae" / "summary.parquet").to_pandas()
    run = open_run(study, "sae-seed-0")
    active = np.concatenate([run.histogram(layer).totals >= 10 for layer in (0, 1)])
    share = summary.query("layer == -1 and measure == 'matched_share'")["mean"].iloc[0]
    assert share == pytest.approx(matches["matched"][active].mean())
    claim = read_json(study / "claims.json")[0]
    assert claim["difference"] is None  # no checkpoints were given
    assert claim["rows"][0]["value"] == pytest.approx(share)


def test_planted_directions_are_found_by_both_seeds() -> None:
    rng = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=rng))[0][:8]
    active = torch.rand(4000, 8, generator=rng).topk(2, dim=1).indices
    codes = torch.zeros(4000, 8).scatter(1, active, 1 + torch.rand(4000, 2, generator=rng))
    training = SAETraining(width=8, k=2, tokens=80000, batch=256, lr=5e-3)
    decoders = []
    for seed in (0, 1):
        sae, rows = train_sae(codes @ directions, training, seed)
        assert rows[-1]["explained_variance"] > 0.8
        decoders.append(torch.nn.functional.normalize(sae.W_dec.detach(), dim=1))
        found = (decoders[-1] @ directions.T).max(dim=0).values
        assert (found > 0.85).float().mean() >= 0.7


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "TOPK"], "its neurons need no SAE; give the dense twin"),
        (["--k", 64], "--k must be at most the width 32"),
        (["--seeds", 1, 1], "two different seeds"),
        (["--checkpoints", "a", "b"], "has no run 'a'"),
        (["--max-tokens", 5], "shorter than one sequence"),
    ],
)
def test_bad_input_is_one_line(
    options: list[object],
    reason: str,
    topk_folder: Path,
    dense_folder: Path,
    token_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [topk_folder if option == "TOPK" else option for option in options]
    flags = ["--model", dense_folder, "--study", tmp_path, "--corpus", token_corpus, "--k", 4]
    assert_one_error(analyze(monkeypatch, "sae", *flags, *options), reason)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["layer-000-seed-0"], "cannot load the SAE"),
        (["somewhere"], "does not say which layer"),
    ],
)
def test_directories_that_hold_no_sae_are_one_line(
    names: list[str],
    reason: str,
    dense_folder: Path,
    token_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [tmp_path / name for name in names]
    for place in places:
        place.mkdir()
    flags = ["--model", dense_folder, "--study", tmp_path, "--corpus", token_corpus]
    result = analyze(monkeypatch, "record", *flags, "--name", "x", "--sae", *places)
    assert_one_error(result, reason)
