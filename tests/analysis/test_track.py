"""Tracking planted neurons over checkpoints and layers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.analysis.conftest import make_model
from tests.analysis.planted import PlantedSource, analyze, assert_one_error, make_corpus
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.study import Run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.analysis.track.run import TrackConfig, stays_from, track_layer, track_layers
from topk_megatron.hf.model import open_model

FIRES = {
    # At each of three checkpoints, the tokens of neurons 0, 1, 2.
    0: (range(2, 60), range(30, 34), range(2, 6)),
    1: (range(2, 4), range(30, 34), range(50, 54)),
    2: (range(2, 4), range(30, 34), range(10, 14)),
}


def planted_rule(step: int):
    def rule(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = np.stack([np.isin(tokens, list(own)) for own in FIRES[step]], axis=1)
        return values.astype(np.float32), np.tile(np.arange(3), (len(tokens), 1))

    return rule


@pytest.fixture(scope="module")
def runs(topk_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    study = tmp_path_factory.mktemp("study")
    tokens = np.random.default_rng(0).integers(2, 60, 6000)
    corpus = make_corpus([tokens[:3000], tokens[3000:]])
    folder = open_model(topk_folder)
    return [
        record(
            PlantedSource(folder, 3, planted_rule(step)),  # pyright: ignore[reportArgumentType]
            corpus,
            RecordConfig(study=study, run=f"t@{step}", top_n=8),
        )
        for step in FIRES
    ]


def test_similarity_to_the_end_is_that_of_what_neurons_fire_on(runs: list[Run]) -> None:
    config = TrackConfig(context_neurons=0, specialised_bits=2)
    found, formation = track_layer(config, runs, 0, None)
    similarity = np.stack([columns["similarity"] for columns in found])
    assert similarity[2] == pytest.approx(1)
    assert similarity[:, 1] == pytest.approx(1)  # always the same tokens
    assert similarity[:2, 2] == pytest.approx(0, abs=1e-9)  # never those of the end
    assert 0.1 < similarity[0, 0] < 0.4
    assert similarity[1, 0] == pytest.approx(1)
    assert formation["formed_at"].tolist() == [1, 0, 2]
    # Neuron 0 fires on everything at first.
    assert formation["specialised_at"].tolist() == [1, 0, 0]
    assert formation["drift"] == pytest.approx([(1 - similarity[0, 0]) / 2, 0, 1], abs=1e-6)


def test_neuron_that_moves_is_not_matched_to_itself(runs: list[Run]) -> None:
    config = TrackConfig(context_neurons=0)
    found, _ = track_layer(config, runs, 0, None)
    assert found[0]["best_match"].tolist()[1] == 1
    assert found[1]["best_match"].tolist()[:2] == [0, 1]
    assert found[2]["best_match"].tolist() == [0, 1, 2]


def test_examples_overlap_with_the_last_checkpoints(runs: list[Run]) -> None:
    config = TrackConfig(context_neurons=0)
    found, _ = track_layer(config, runs, 0, None)
    # All values tie, so that the examples are the first places of a neuron's tokens.
    assert found[0]["example_overlap"].tolist() == [0, 1, 0] or found[0]["example_overlap"][0] < 1
    assert found[1]["example_overlap"].tolist() == [1, 1, 0]
    assert found[2]["example_overlap"].tolist() == [1, 1, 1]


@given(flags=hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 4))))
def test_stays_from_is_the_first_after_which_all_are_true(flags: np.ndarray) -> None:
    found = stays_from(flags)
    for column, first in zip(flags.T, found, strict=True):
        expected = next((n for n in range(len(column)) if column[n:].all()), -1)
        assert first == expected


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trajectory")
    entries = []
    for iteration in (100, 200):
        name = f"iter_{iteration:07d}"
        make_model(directory / name, layers=(0, 1), seed=iteration, iteration=iteration)
        entries.append({"name": name, "iteration": iteration, "tokens_seen": 5, "k": 4})
    (directory / "trajectory.json").write_text(
        json.dumps({"format_version": 1, "revisions": entries})
    )
    return directory


def test_an_exported_trajectory_is_recorded_and_tracked(
    trajectory: Path, token_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--trajectory", trajectory, "--study", tmp_path, "--corpus", token_corpus]
    flags += ["--name", "t", "--min-count", 5, "--context-neurons", 0]
    code, out, err = analyze(monkeypatch, "track", *flags)
    assert code == 0, err
    assert "is more like itself at the end" in out
    checkpoints = read_table(tmp_path / "track" / "checkpoints.parquet")
    assert checkpoints.num_rows == 2 * 2 * 32
    last = checkpoints.to_pandas().query("iteration == 200")
    np.testing.assert_allclose(last["similarity"].dropna(), 1)
    assert read_json(tmp_path / "track" / "parameters.json")["runs"] == [
        "t@iter_0000100",
        "t@iter_0000200",
    ]
    layers = read_table(tmp_path / "track" / "layers.parquet").to_pandas()
    assert layers["layer_a"].unique().tolist() == [0]
    assert (layers["keeps"] == (layers["best_match"] == layers["neuron"])).all()


def test_a_run_of_one_layer_has_no_pairs_of_layers(runs: list[Run]) -> None:
    assert track_layers(runs[0], 0).num_rows == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "holds no trajectory.json"),
        ("{", "cannot be read as JSON"),
        ('{"revisions": [{"name": "a"}]}', "is damaged"),
        ('{"revisions": [{"name": "a", "iteration": 1}]}', "tracking needs two"),
    ],
)
def test_bad_trajectories_are_one_line(
    content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "trajectory.json").write_text(content)
    flags = ("--trajectory", tmp_path, "--study", tmp_path, "--corpus", "x")
    assert_one_error(analyze(monkeypatch, "track", *flags), reason)
