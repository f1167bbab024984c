"""A run leaves its process groups exactly when no rank can still wait for another."""

import pytest
import torch.distributed as dist

from topk_megatron.train.main import leaving_groups


@pytest.fixture(autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def test_a_run_that_ends_leaves_its_groups() -> None:
    with leaving_groups():
        pass
    assert not dist.is_initialized()


def test_a_run_that_was_asked_to_stop_leaves_them_and_keeps_its_exit_code() -> None:
    with pytest.raises(SystemExit) as ended, leaving_groups():
        raise SystemExit(75)
    assert ended.value.code == 75
    assert not dist.is_initialized()


def test_a_run_with_an_error_does_not_wait_for_ranks_that_may_be_gone() -> None:
    try:
        with pytest.raises(RuntimeError), leaving_groups():
            raise RuntimeError
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
