"""Which checkpoint is taken, and which settings are compared; on stand-ins for checkpoints."""

from argparse import Namespace
from pathlib import Path

import pytest

from topk_megatron.config import TopKConfig
from topk_megatron.errors import CheckpointError
from topk_megatron.train.resume import TRACKER, compare_topk, find_checkpoint


def checkpoint(load: Path, iteration: int, *parts: str) -> Path:
    directory = load / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    for part in parts or (".metadata", "metadata.json"):
        (directory / part).write_text("{}")
    return directory


def settings(**changes: object) -> TopKConfig:
    base = {"hidden_size": 64, "num_layers": 4, "k": 8, "layers": (0, 1)}
    return TopKConfig(**{**base, **changes})  # pyright: ignore[reportArgumentType]


def test_tracked_checkpoint_is_taken_even_if_a_later_one_exists(tmp_path: Path) -> None:
    wanted = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    (tmp_path / TRACKER).write_text("10\n")
    assert find_checkpoint(tmp_path) == wanted


@pytest.mark.parametrize("tracker", ["", "garbage", "20", "30", None])
def test_latest_complete_checkpoint_stands_in_for_a_broken_tracker(
    tracker: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 20, ".metadata")  # killed before metadata.json
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert find_checkpoint(tmp_path) == wanted
    assert find_checkpoint(tmp_path, write=True) == wanted
    assert (tmp_path / TRACKER).read_text() == "10"
    assert "resuming from 10" in capsys.readouterr().out


def test_nothing_to_resume_is_no_error(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 5, "__0_0.distcp")  # killed during the very first save
    assert find_checkpoint(tmp_path) is None


def test_step_that_is_not_there_is_an_error_that_lists_what_is(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"iteration 7 in .* it has 10"):
        find_checkpoint(tmp_path, 7)


def test_only_incomplete_checkpoints_are_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, ".metadata")
    (tmp_path / TRACKER).write_text("10")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_differences_name_both_values() -> None:
    assert compare_topk(settings(), settings()) == []
    assert compare_topk(settings(k=4, mode="abs"), settings()) == [
        "k is 4 in the checkpoint, 8 here",
        "mode is abs in the checkpoint, value here",
    ]


def test_dense_models_are_equal_whatever_their_unused_settings() -> None:
    dense = settings(layers=())
    assert compare_topk(None, dense) == []
    assert compare_topk(settings(layers=(), k=3), dense) == []
    assert compare_topk(None, settings()) == [
        "dense (no TopK layer) in the checkpoint, k 8 at layers [0, 1] here"
    ]


def test_each_flag_wins_over_the_settings_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topk_megatron.train import resume

    checkpoint(tmp_path, 10)
    (tmp_path / TRACKER).write_text("10")
    saved = Namespace(topk=settings(k=5, mode="abs").to_dict())
    monkeypatch.setattr(resume, "read_checkpoint_args", lambda _: saved)
    flags = {f"topk_{name}": None for name in resume._FLAGS}
    args = Namespace(
        use_checkpoint_args=True,
        load=str(tmp_path),
        ckpt_step=None,
        hidden_size=64,
        num_layers=4,
        **flags,
    )
    assert resume.choose_settings(args) == settings(k=5, mode="abs")
    args.topk_k, args.topk_layers = 7, "all,-1"
    assert resume.choose_settings(args) == settings(k=7, mode="abs", layers=(0, 1, 2))
    args.topk_site, args.topk_mlp_k = "both", 4
    with_mlp = settings(k=7, mode="abs", layers=(0, 1, 2), site="both", mlp_k=4)
    assert resume.choose_settings(args) == with_mlp
    saved.topk = with_mlp.to_dict()
    args.topk_site, args.topk_mlp_k = "residual", None
    assert resume.choose_settings(args) == settings(k=7, mode="abs", layers=(0, 1, 2))
