"""The settings of the MLP site that fit an inner dimension."""

import pytest

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.model.mlp import check_fit


def config(k: int, groups: int | None) -> TopKConfig:
    return TopKConfig(
        hidden_size=64, num_layers=2, k=8, layers=(0,), site="mlp", mlp_k=k, mlp_groups=groups
    )


@pytest.mark.parametrize(("k", "groups", "size"), [(6, None, 4), (48, None, 1), (8, 4, 2)])
def test_settings_that_fit_pass(k: int, groups: int | None, size: int) -> None:
    check_fit(config(k, groups), 48, size)


@pytest.mark.parametrize(
    ("k", "groups", "size", "complaint"),
    [
        (49, None, 1, "--topk-mlp-k must be at most the MLP's inner dimension, 48, got 49"),
        (10, 5, 1, "--topk-mlp-groups must divide the MLP's inner dimension, 48, got 5"),
        (6, 3, 2, "--topk-mlp-groups 3 cannot be split over 2 tensor-parallel ranks"),
    ],
)
def test_settings_that_do_not_fit_say_which_number_to_change(
    k: int, groups: int | None, size: int, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_fit(config(k, groups), 48, size)
