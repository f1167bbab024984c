"""The choice of checkpoint and the comparison of settings, on small imitations of checkpoints."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from topk_megatron.checkpoint.directory import TRACKER, open_checkpoint
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.config import TopKConfig
from topk_megatron.errors import CheckpointError, ConfigError
from topk_megatron.train import resume
from topk_megatron.train.resume import choose_settings, compare_topk


def checkpoint(load: Path, iteration: int, *parts: str) -> Path:
    directory = load / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    if not parts:
        save({"weight": torch.arange(4.0)}, checkpoint_id=str(directory), no_dist=True)
        parts = ("metadata.json",)
    for part in parts:
        (directory / part).write_text("{}")
    return directory


def found(reader: CheckpointReader | None) -> Path | None:
    return None if reader is None else reader.directory


def settings(**changes: object) -> TopKConfig:
    base = {"hidden_size": 64, "num_layers": 4, "k": 8, "layers": (0, 1)}
    return TopKConfig(**{**base, **changes})  # pyright: ignore[reportArgumentType]


def test_tracked_checkpoint_is_taken_even_if_a_later_one_exists(tmp_path: Path) -> None:
    wanted = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    (tmp_path / TRACKER).write_text("10\n")
    assert found(open_checkpoint(tmp_path)) == wanted


@pytest.mark.parametrize("tracker", ["", "garbage", "20", "30", None])
def test_latest_complete_checkpoint_replaces_a_broken_tracker(
    tracker: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 20, ".metadata")  # killed before metadata.json
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert found(open_checkpoint(tmp_path)) == wanted
    assert found(open_checkpoint(tmp_path, write=True)) == wanted
    assert (tmp_path / TRACKER).read_text() == "10"
    assert "resuming from 10" in capsys.readouterr().out


def cut_short(directory: Path) -> None:
    (data,) = directory.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-20])


def missing_data(directory: Path) -> None:
    next(directory.glob("*.distcp")).unlink()


def garbage_directory(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"garbage")


DAMAGES = {
    "bytes of": cut_short,
    "is missing": missing_data,
    ".metadata cannot be read": garbage_directory,
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_latest_checkpoint_gives_way_to_the_one_before_and_says_so(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = checkpoint(tmp_path, 10)
    DAMAGES[said](checkpoint(tmp_path, 20))
    checkpoint(tmp_path, 30)  # left by a run that then went back to 20: not the tracked one
    (tmp_path / TRACKER).write_text("20")
    assert found(open_checkpoint(tmp_path, write=True)) == wanted
    assert (tmp_path / TRACKER).read_text() == "10"
    output = capsys.readouterr().out
    assert "names iteration 20, which is damaged" in output
    assert said in output
    assert "resuming from 10" in output


def test_without_any_whole_checkpoint_the_damages_are_listed(tmp_path: Path) -> None:
    for iteration in (10, 20):
        missing_data(checkpoint(tmp_path, iteration))
    (tmp_path / TRACKER).write_text("20")
    with pytest.raises(CheckpointError, match=r"20, which is damaged.*10 is damaged.*is missing"):
        open_checkpoint(tmp_path)


def test_damaged_checkpoint_that_was_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    cut_short(checkpoint(tmp_path, 20))
    with pytest.raises(CheckpointError, match=r"iteration 20 .* is damaged"):
        open_checkpoint(tmp_path, 20)


def test_nothing_to_resume_is_not_an_error(tmp_path: Path) -> None:
    assert open_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 5, "__0_0.distcp")  # killed during the very first save
    assert open_checkpoint(tmp_path) is None


def test_step_that_is_not_there_is_an_error_that_lists_what_is(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"iteration 7 in .* it has 10"):
        open_checkpoint(tmp_path, 7)


def test_only_incomplete_checkpoints_are_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, ".metadata")
    (tmp_path / TRACKER).write_text("10")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)


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


def opened(**saved: object) -> Any:
    """An open checkpoint of a run with these arguments."""
    return SimpleNamespace(args=Namespace(**saved), directory=Path("run/iter_0000010"))


def test_each_flag_overrides_the_settings_of_the_checkpoint() -> None:
    before = opened(topk=settings(k=5, mode="abs").to_dict())
    args = run_flags(use_checkpoint_args=True, train_iters=None)
    assert choose_settings(args, before) == settings(k=5, mode="abs")
    args.topk_k, args.topk_layers = 7, "all,-1"
    assert choose_settings(args, before) == settings(k=7, mode="abs", layers=(0, 1, 2))
    args.topk_site, args.topk_mlp_k = "both", 4
    with_mlp = settings(k=7, mode="abs", layers=(0, 1, 2), site="both", mlp_k=4)
    assert choose_settings(args, before) == with_mlp
    args.topk_site, args.topk_mlp_k = "residual", None
    before = opened(topk=with_mlp.to_dict())
    assert choose_settings(args, before) == settings(k=7, mode="abs", layers=(0, 1, 2))


def test_the_sizes_come_from_a_stock_checkpoint_that_has_no_topk_settings() -> None:
    args = run_flags(use_checkpoint_args=True, k=8, layers="0-1")
    args.hidden_size = args.num_layers = None
    stock = opened(hidden_size=64, num_layers=4)
    assert choose_settings(args, stock) == settings()
    with pytest.raises(ConfigError, match="--hidden-size is required"):
        choose_settings(args, None)


ANNEALED = {"anneal": "linear", "anneal_begin": 2, "anneal_end": 9}


def run_flags(**given: object) -> Namespace:
    """Parsed flags of a resumed run, with the given TopK flags."""
    flags = {f"topk_{name}": given.pop(name, None) for name in resume._FLAGS}
    rest = {"use_checkpoint_args": False, "finetune": False, "train_iters": 40, **given}
    return Namespace(load="run", ckpt_step=None, hidden_size=64, num_layers=4, **flags, **rest)


SAME = {"k": 8, "layers": "0-1", "anneal": "linear", "anneal_begin": 2}


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, 9),  # the end that the run started with; from --train-iters it would now be 21
        ({"anneal_end": 30}, 30),
        ({"anneal": "cosine"}, 21),
        ({"anneal_begin": 4}, 22),
        ({"finetune": True}, 21),
    ],
)
def test_a_longer_run_keeps_its_end_of_annealing(changes: dict[str, object], end: int) -> None:
    before = opened(topk=settings(**ANNEALED).to_dict())
    assert choose_settings(run_flags(**{**SAME, **changes}), before).anneal_end == end


def test_annealing_ends_halfway_if_the_checkpoint_has_no_end() -> None:
    for before in (None, opened(topk=None), opened(topk=settings().to_dict())):
        assert choose_settings(run_flags(**SAME), before).anneal_end == 21


@pytest.mark.parametrize(
    ("given", "before", "expected"),
    [
        ({"anneal": "constant"}, ANNEALED, ("constant", 0, 0)),
        ({"anneal": "cosine"}, ANNEALED, ("cosine", 2, 9)),
        ({"anneal": "cosine"}, {}, ("cosine", 0, 20)),
        ({"anneal": "cosine", "anneal_begin": 10}, {}, ("cosine", 10, 25)),
        ({"anneal_end": 12}, ANNEALED, ("linear", 2, 12)),
        ({}, ANNEALED, ("linear", 2, 9)),
    ],
)
def test_flags_override_the_annealing_of_the_checkpoint(
    given: dict[str, object],
    before: dict[str, object],
    expected: tuple[str, int, int],
) -> None:
    checkpoint = opened(topk=settings(**before).to_dict())
    chosen = choose_settings(run_flags(use_checkpoint_args=True, **given), checkpoint)
    assert (chosen.anneal, chosen.anneal_begin, chosen.anneal_end) == expected
