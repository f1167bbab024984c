"""Resuming, reloading in another layout, kills during a save, and refusals."""

from pathlib import Path

import pytest

from tests.distributed.conftest import TOPK
from tests.harness.launch import Run, pretrain
from topk_megatron.checkpoint.directory import TRACKER, is_complete

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ANNEAL = ["--topk-anneal", "exponential", "--topk-anneal-begin", "2", "--topk-anneal-end", "16"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def succeeded(run: Run) -> Run:
    assert run.returncode == 0, run.output
    return run


def saving(directory: Path, interval: int = 10) -> list[str]:
    return ["--save", str(directory), "--load", str(directory), "--save-interval", str(interval)]


def test_interrupted_and_resumed_equals_uninterrupted_bitwise(
    flags: list[str], tmp_path: Path
) -> None:
    # Dropout is on, so that the states of the random generators must be restored too.
    settings = [*flags, *TOPK, *ANNEAL, "--hidden-dropout", "0.1"]
    whole = succeeded(pretrain(1, *settings, tensorboard=tmp_path / "whole"))
    save = saving(tmp_path / "checkpoint")
    first = [*settings, *save, "--exit-interval", "10"]
    succeeded(pretrain(1, *first, tensorboard=tmp_path / "first"))
    second = succeeded(pretrain(1, *settings, *save, tensorboard=tmp_path / "second"))

    expected = {step: loss for step, loss in whole.losses().items() if step > 10}
    assert len(expected) == 10
    assert second.losses() == expected
    ks = {step: k for step, k in whole.scalars("topk/k").items() if step > 10}
    assert second.scalars("topk/k") == ks
    assert ks[11] > ks[20] == 8


@pytest.fixture(scope="module")
def tp2_checkpoint(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tp2")
    settings = [*flags, *TOPK, *TP2, "--exit-interval", "10"]
    succeeded(pretrain(2, *settings, "--save", directory, "--save-interval", "10"))
    return directory


def test_tensor_parallel_checkpoint_continues_in_a_pipeline(
    flags: list[str], tp2_checkpoint: Path, tmp_path: Path
) -> None:
    load = [*flags, *TOPK, "--load", str(tp2_checkpoint)]
    before = succeeded(pretrain(2, *load, *TP2, "--skip-train")).validation_losses()
    after = succeeded(pretrain(2, *load, *PP2, "--skip-train")).validation_losses()
    assert len(before) == len(after) == 1
    assert after[0] == pytest.approx(before[0], abs=1e-5)

    same = succeeded(pretrain(2, *load, *TP2, tensorboard=tmp_path / "tp"))
    other = succeeded(pretrain(2, *load, *PP2, tensorboard=tmp_path / "pp"))
    assert sorted(same.losses()) == list(range(11, 21))
    assert other.losses() == pytest.approx(same.losses(), abs=2e-5)


@pytest.mark.parametrize(
    "point", ["before-data", "before-index", "before-metadata", "tracker-truncated"]
)
def test_killed_during_a_save_resumes_from_the_last_complete_checkpoint(
    point: str, flags: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    settings = [*flags, *TOPK, *saving(directory, 5), "--train-iters", "12"]
    killed = pretrain(
        2,
        *settings,
        *TP2,
        entry=Path(__file__).with_name("killed_pretrain.py"),
        environment={"TOPK_KILL_AT": point, "TOPK_KILL_SAVE": "10"},
    )
    assert killed.returncode != 0
    # At the last point the save is complete except for the tracker; otherwise iteration 5 is last.
    survivor = 10 if point == "tracker-truncated" else 5
    assert is_complete(directory / "iter_0000010") == (survivor == 10)
    tracked = (directory / TRACKER).read_text()
    assert tracked == ("" if survivor == 10 else "5")

    resumed = succeeded(pretrain(2, *settings, *TP2, tensorboard=tmp_path / "resumed"))
    assert sorted(resumed.losses()) == list(range(survivor + 1, 13))
    assert is_complete(directory / "iter_0000010")
    assert (directory / TRACKER).read_text() == "12"


def test_tracker_that_names_a_missing_checkpoint_falls_back_and_says_so(
    flags: list[str], initial: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "iter_0000001").symlink_to(initial / "iter_0000001")
    (directory / TRACKER).write_text("7")
    run = succeeded(pretrain(1, *flags, *TOPK, "--load", directory, "--skip-train"))
    assert "names iteration 7, which is incomplete; resuming from 1" in run.output


@pytest.fixture(scope="module")
def dense_checkpoint(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    settings = [*flags, "--topk-layers", "none", "--train-iters", "2"]
    succeeded(pretrain(1, *settings, "--save", directory, "--save-interval", "2"))
    return directory


class TestSettingsOfTheCheckpoint:
    def test_other_settings_are_refused_with_both_values(
        self, flags: list[str], initial: Path
    ) -> None:
        run = pretrain(1, *flags, "--topk-k", "4", "--topk-layers", "0-1", "--load", initial)
        assert run.returncode != 0
        assert "k is 8 in the checkpoint, 4 here" in run.error_line()
        assert "layers is [0, 1, 2] in the checkpoint, [0, 1] here" in run.error_line()
        assert "--topk-override" in run.error_line()

    def test_override_continues_with_the_new_settings(
        self, flags: list[str], tp2_checkpoint: Path
    ) -> None:
        change = ["--topk-k", "4", "--topk-layers", "0-2", "--topk-override"]
        run = succeeded(pretrain(1, *flags, *change, "--load", tp2_checkpoint))
        assert "TopK settings differ from" in run.output
        assert "k is 8 in the checkpoint, 4 here" in run.output
        assert "k: 4 of 64" in run.output

    def test_dense_checkpoint_starts_a_topk_run_only_when_asked_to(
        self, flags: list[str], dense_checkpoint: Path
    ) -> None:
        refused = pretrain(1, *flags, *TOPK, "--load", dense_checkpoint)
        assert refused.returncode != 0
        assert "dense (no TopK layer) in the checkpoint" in refused.error_line()
        start = ["--load", str(dense_checkpoint), "--finetune", "--train-iters", "2"]
        assert "k: 8 of 64" in succeeded(pretrain(1, *flags, *TOPK, *start)).output

    def test_tokenizer_of_another_size_is_refused(
        self, flags: list[str], initial: Path, corpus: Path, dataset: Path, tmp_path: Path
    ) -> None:
        from tests.conftest import run_tool

        other = tmp_path / "other.model"
        made = run_tool(
            "train_tokenizer.py",
            *("--input", f"{corpus}/*.txt", "--output", other, "--vocab-size", "600"),
        )
        assert made.returncode == 0, made.stderr
        # Data without a manifest, which would reveal the mistake before the checkpoint does.
        for suffix in (".bin", ".idx"):
            (tmp_path / f"text{suffix}").symlink_to(f"{dataset}{suffix}")
        change = ["--tokenizer-model", str(other), "--data-path", str(tmp_path / "text")]
        run = pretrain(1, *flags, *TOPK, "--load", initial, *change)
        assert run.returncode != 0
        assert "trained with 512 pieces" in run.error_line()
        assert "has 600" in run.error_line()
