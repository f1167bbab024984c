"""Our core attention on a GPU: Megatron's results, without the scores of all pairs of tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.attention import both, causal, prepare_megatron, qkv, result

# As large as rounding in the format may make the difference of two sums of 128 products.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare_megatron()


def on_gpu(*sizes: Any, dtype: torch.dtype) -> list[Tensor]:
    return [part.detach().cuda().requires_grad_() for part in qkv(*sizes, dtype=dtype)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_results_are_those_of_megatrons_class(
    masked: bool, groups: int, dtype: torch.dtype
) -> None:
    theirs, ours = both(groups=groups, size=64, bf16=dtype == torch.bfloat16)
    theirs.scale_mask_softmax.scaled_masked_softmax_fusion = False
    x = on_gpu(128, 2, 4, groups, 64, dtype=dtype)
    mask = causal(128).cuda() if masked else None
    got, wanted = (result(lambda m=m: m(*x, mask), x) for m in (ours, theirs))
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [4, 2])
def test_memory_does_not_grow_with_the_square_of_the_length(
    groups: int, dtype: torch.dtype
) -> None:
    peaks = []
    for length in (4096, 8192):
        _, ours = both(groups=groups, size=64, bf16=dtype == torch.bfloat16)
        x = on_gpu(length, 1, 4, groups, 64, dtype=dtype)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result(lambda m=ours, x=x: m(*x, None), x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]
