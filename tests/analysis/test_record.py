"""Recording against brute force; resumed, shared and damaged runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.analysis.conftest import HIDDEN, VOCAB, K
from tests.analysis.planted import analyze, assert_one_error, files_of
from tests.harness.launch import REPOSITORY
from topk_megatron.analysis.corpus import Corpus, open_corpus
from topk_megatron.analysis.record import merge
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.study import Run, open_run
from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import open_model
from topk_megatron.ops.reference import topk_mask_reference

SETTINGS: dict[str, Any] = {"block_tokens": 300, "top_n": 5, "bootstrap_neurons": 4, "raw": True}
# Another number of threads sums in another order.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = ("--block-tokens", 300, "--top-n", 5, "--bootstrap-neurons", 4, "--activations")


def corpus_of(prefix: Path) -> Corpus:
    return open_corpus(str(prefix), lambda: None)


def make_run(folder: Path, prefix: Path, study: Path, name: str = "run", **options: object) -> Run:
    source = make_source(open_model(folder), **options)  # pyright: ignore[reportArgumentType]
    return record(source, corpus_of(prefix), RecordConfig(study=study, run=name, **SETTINGS))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def topk_run(topk_folder: Path, token_corpus: Path, study: Path) -> Run:
    return make_run(topk_folder, token_corpus, study, "topk")


@pytest.fixture(scope="module")
def dense_run(dense_folder: Path, token_corpus: Path, study: Path) -> Run:
    return make_run(dense_folder, token_corpus, study, "dense", k=K, layers="0,2")


def brute_force(folder: Path, prefix: Path, layer: int) -> np.ndarray:
    """Selected states [tokens, H] of a layer, 0 elsewhere, sequence by sequence."""
    model = open_model(folder).model
    tokens = torch.from_numpy(np.asarray(corpus_of(prefix).tokens, dtype=np.int64))
    rows = []
    for begin in range(0, len(tokens), 32):
        hidden: list[torch.Tensor] = []
        hook = model.model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, hidden=hidden: hidden.append(output)
        )
        with torch.no_grad():
            model(tokens[None, begin : begin + 32])
        hook.remove()
        rows.append(topk_mask_reference(hidden[0][0], K, "value")[0])
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(("name", "layer"), [("topk", 0), ("topk", 1), ("dense", 0), ("dense", 2)])
def test_every_activation_is_the_models(
    name: str,
    layer: int,
    request: pytest.FixtureRequest,
    token_corpus: Path,
) -> None:
    run = request.getfixturevalue(f"{name}_run")
    expected = brute_force(request.getfixturevalue(f"{name}_folder"), token_corpus, layer)
    found = np.zeros_like(expected)
    documents = corpus_of(token_corpus).documents_of(np.arange(len(expected)))
    table = run.activations(layer).to_pandas()
    found[table["position"], table["neuron"]] = table["value"]
    assert (table["document"] == documents[table["position"]]).all()
    assert (table["run"] == run.name).all()
    assert (table["layer"] == layer).all()
    assert len(table) == np.count_nonzero(expected)
    # Batches of other sizes sum in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_aggregates_are_those_of_the_recorded_activations(
    name: str, request: pytest.FixtureRequest, token_corpus: Path
) -> None:
    run = request.getfixturevalue(f"{name}_run")
    tokens = np.asarray(corpus_of(token_corpus).tokens)
    for layer in run.layers:
        dense = np.zeros((len(tokens), HIDDEN), np.float32)
        own = run.activations(layer).to_pandas()
        dense[own["position"], own["neuron"]] = own["value"]
        histogram = run.histogram(layer)
        neurons = run.neurons.to_pandas()
        neurons = neurons[neurons["layer"] == layer].set_index("neuron")
        for neuron in range(HIDDEN):
            column = dense[:, neuron].astype(np.float64)
            active = column != 0
            found_tokens, counts, mass = histogram.of(neuron)
            expected = np.bincount(tokens[active], minlength=VOCAB)
            assert np.array_equal(found_tokens, np.flatnonzero(expected))
            assert np.array_equal(counts, expected[expected > 0])
            weights = np.bincount(tokens, weights=np.abs(column), minlength=VOCAB)
            np.testing.assert_allclose(mass, weights[expected > 0], rtol=1e-12)
            row = neurons.loc[neuron]
            assert row["count"] == active.sum()
            np.testing.assert_allclose(row["sum_squares"], (column**2).sum(), rtol=1e-12)
            if active.any():
                assert row["max"] == column[active].max()
                assert row["min"] == column[active].min()


def test_examples_are_the_strongest_of_the_whole_corpus(topk_run: Run) -> None:
    examples = topk_run.examples.to_pandas()
    for layer in topk_run.layers:
        raw = topk_run.activations(layer).to_pandas()
        for neuron in range(HIDDEN):
            own = raw[raw["neuron"] == neuron]
            pairs = sorted(
                (-v, p)
                for v, p in zip(own["value"].tolist(), own["position"].tolist(), strict=True)
            )
            found = examples[(examples["layer"] == layer) & (examples["neuron"] == neuron)]
            assert [
                (-v, p)
                for v, p in zip(found["value"].tolist(), found["position"].tolist(), strict=True)
            ] == pairs[:5]
            assert found["rank"].tolist() == list(range(len(found)))
            for _, row in found.iterrows():
                assert row["context"][row["target"]] == row["token"]
                assert row["values"][row["target"]] == np.float32(row["value"])


def test_block_histograms_add_up_to_the_whole(topk_run: Run) -> None:
    table = topk_run.tables["blocks"].to_pandas()
    for layer in topk_run.layers:
        own = table[table["layer"] == layer]
        assert own["neuron"].nunique() <= 4
        summed = own.groupby(["neuron", "token"])["count"].sum()
        for neuron in own["neuron"].unique():
            tokens, counts, _ = topk_run.histogram(layer).of(neuron)
            assert summed[neuron].index.tolist() == tokens.tolist()
            assert summed[neuron].tolist() == counts.tolist()


def test_aggregates_do_not_need_the_raw_activations(
    topk_run: Run, topk_folder: Path, token_corpus: Path, tmp_path: Path
) -> None:
    source = make_source(open_model(topk_folder))
    config = RecordConfig(study=tmp_path, run="topk", **{**SETTINGS, "raw": False})
    done = record(source, corpus_of(token_corpus), config)
    one, two = files_of(topk_run.directory), files_of(done.directory)
    assert {name for name in one if name not in two} == {
        name for name in one if name.startswith(("activations", "tokens"))
    }
    assert all(one[name] == two[name] for name in two if name != "manifest.json")
    with pytest.raises(AnalysisError, match=r"holds no single activations.*--activations"):
        done.activations(0)


def test_activations_can_be_cut_to_neurons_and_positions(topk_run: Run) -> None:
    every = topk_run.activations(1).to_pandas()
    # Blocks are of 288 tokens: the positions begin in one and end in another.
    for positions in (range(250, 600), [3, 900], range(0)):
        found = topk_run.activations(1, neurons=[4, 17, 30], positions=positions).to_pandas()
        kept = every["neuron"].isin([4, 17, 30]) & every["position"].isin(list(positions))
        expected = every[kept].reset_index(drop=True)
        assert found.astype({"run": str}).equals(expected.astype({"run": str}))
    assert topk_run.activations(1, neurons=[]).num_rows == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer": 2}, "layer 2 was not recorded"),
        ({"layer": 0, "neurons": [3, 32]}, "neuron 32 is out of range"),
        ({"layer": 0, "positions": range(5000, 5002)}, "position 5000 is out of range"),
        ({"layer": 0, "positions": [-1, 5]}, "position -1 is out of range"),
    ],
)
def test_activations_out_of_range_are_refused(
    topk_run: Run, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AnalysisError, match=reason):
        topk_run.activations(**options)


@pytest.mark.parametrize(
    ("flags", "kept"), [((), False), (("--aggregate-only",), False), (("--activations",), True)]
)
def test_activations_are_kept_on_request_only(
    flags: tuple[str, ...],
    kept: bool,
    topk_folder: Path,
    token_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = ["record", "--model", topk_folder, "--corpus", token_corpus, "--study", tmp_path]
    code, _, err = analyze(monkeypatch, *base, "--name", "run", "--block-tokens", 300, *flags)
    assert code == 0, err
    run = open_run(tmp_path, "run")
    for name in ("activations", "tokens"):
        files = list((run.directory / name).glob("*.parquet"))
        assert len(files) == (run.manifest["blocks"] if kept else 0)
    assert run.manifest["raw"] is kept
    assert run.claims == []
    assert set(run.tables) >= {"neurons", "examples", "blocks", "histograms/layer-000"}


def test_small_tables_in_memory_change_nothing(
    topk_run: Run,
    topk_folder: Path,
    token_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge, "_PAIRS", 5 * VOCAB)
    done = make_run(topk_folder, token_corpus, tmp_path, "topk")
    for layer in (0, 1):
        name = f"histograms/layer-{layer:03d}"
        found = read_table(done.directory / f"{name}.parquet")
        assert found.equals(topk_run.tables[name])


def command(folder: Path, prefix: Path, study: Path, block_tokens: int = 300) -> list[str]:
    arguments = ["record", "--model", folder, "--corpus", prefix, "--study", study]
    arguments += ["--name", "topk", *FLAGS, "--block-tokens", block_tokens]
    return [str(REPOSITORY / "tools/analyze.py"), *map(str, arguments)]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    topk_folder: Path, token_corpus: Path, tmp_path: Path
) -> None:
    source = make_source(open_model(topk_folder))
    config = RecordConfig(study=tmp_path / "a", run="topk", **{**SETTINGS, "block_tokens": 32})
    whole = record(source, corpus_of(token_corpus), config)
    directory = tmp_path / "b" / "runs" / "topk"
    call = [sys.executable, *command(topk_folder, token_corpus, tmp_path / "b", 32)]
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 120
    # Kill it when some of the 40 blocks are there.
    while not list(directory.glob("parts/block-000001.npz")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "manifest.json").exists()
    (directory / "parts" / "block-000000.npz").write_bytes(b"half a file")
    # A kill in the middle of a table leaves it under its temporary name.
    for name in (".vocabulary.parquet.partial-7", "activations/.block-000003.parquet.partial-7"):
        (directory / name).write_bytes(b"half a file")
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert files_of(directory) == files_of(whole.directory)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_equal_one(
    topk_run: Run, topk_folder: Path, token_corpus: Path, tmp_path: Path
) -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*call, *command(topk_folder, token_corpus, tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "runs" / "topk") == files_of(topk_run.directory)


def test_a_finished_run_is_kept_and_other_settings_are_refused(
    topk_run: Run, topk_folder: Path, token_corpus: Path, study: Path
) -> None:
    before = (topk_run.directory / "manifest.json").stat().st_mtime_ns
    make_run(topk_folder, token_corpus, study, "topk")
    elsewhere = Path(os.path.relpath(topk_folder))  # the same model, under another name
    make_run(elsewhere, Path(os.path.relpath(token_corpus)), study, "topk")
    assert (topk_run.directory / "manifest.json").stat().st_mtime_ns == before
    config = RecordConfig(study=study, run="topk", **{**SETTINGS, "top_n": 6})
    with pytest.raises(AnalysisError, match="started with another top_n"):
        record(make_source(open_model(topk_folder)), corpus_of(token_corpus), config)


def test_damaged_and_missing_files_of_a_run_are_named(
    topk_folder: Path, token_corpus: Path, tmp_path: Path
) -> None:
    run = make_run(topk_folder, token_corpus, tmp_path, "run")
    victim = run.directory / "histograms" / "layer-001.parquet"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(AnalysisError, match=r"layer-001\.parquet is damaged"):
        run.histogram(1)
    victim.unlink()
    with pytest.raises(AnalysisError, match=r"layer-001\.parquet is missing"):
        run.histogram(1)
    block = run.directory / "activations" / "block-000001.parquet"
    block.write_bytes(block.read_bytes()[:-9])
    assert run.activations(0, positions=[0, 1]).num_rows == 2 * K  # of the block before
    with pytest.raises(AnalysisError, match=r"block-000001\.parquet is damaged"):
        run.activations(0)
    (run.directory / "manifest.json").write_text("{")
    with pytest.raises(AnalysisError, match=r"manifest\.json cannot be read as JSON"):
        open_run(tmp_path, "run")
    (run.directory / "manifest.json").unlink()
    with pytest.raises(AnalysisError, match="is unfinished"):
        open_run(tmp_path, "run")
    with pytest.raises(AnalysisError, match="has no run 'other'"):
        open_run(tmp_path, "other")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "DENSE"], "has no TopK layers; give --k"),
        (["--model", "DENSE", "--k", 0], "--k must be in [1, 32], got 0"),
        (["--model", "DENSE", "--k", 4, "--layers", "7"], "layer 7 is out of range"),
        (["--layers", "2"], "layer 2 of"),
        (["--k", 4], "--k is for dense models"),
        (["--model", "EMPTY"], "holds no config.json"),
        (["--corpus", "NOWHERE"], "no file matches"),
        (["--corpus", "EMPTY"], "is empty"),
        (["--documents", "5"], "FIRST:LAST"),
        (["--documents", "12:"], "is empty"),
        (["--seq-length", 64], "more than the 32 positions"),
        (["--max-tokens", 0], "--max-tokens must be at least 1"),
        (["--top-n", 0], "--top-n must be at least 1"),
        (["--name", "a/b"], "a run is named with letters"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[object],
    reason: str,
    topk_folder: Path,
    dense_folder: Path,
    token_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"DENSE": dense_folder, "EMPTY": tmp_path / "empty", "NOWHERE": tmp_path / "x.txt"}
    flags = [names.get(str(flag), flag) for flag in flags]
    base = ["record", "--model", topk_folder, "--corpus", token_corpus]
    result = analyze(monkeypatch, *base, "--study", tmp_path, "--name", "run", *flags)
    assert_one_error(result, reason)
    assert not (tmp_path / "runs" / "run" / "manifest.json").exists()
