"""Without a kernel the reference computes the same, and a warning says once why."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.rows import as_bits, make_rows
from topk_megatron.ops import extension
from topk_megatron.ops.library import _topk_mask_backward_fallback, _topk_mask_fallback

ROOT = Path(__file__).parents[2]


def run_without_library(script: str, tmp_path: Path, build_error: str = "") -> str:
    """Run Python on a copy of the package without a compiled library; return its stdout."""
    copy = tmp_path / "topk_megatron" / "ops"
    copy.mkdir(parents=True)
    for source in (ROOT / "topk_megatron" / "ops").glob("*.py"):
        (copy / source.name).write_text(source.read_text())
    (copy.parent / "__init__.py").write_text("")
    if build_error:
        (copy / "_build_error_cpu.txt").write_text(build_error)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


WARN_SCRIPT = """
    import warnings, torch
    from topk_megatron.ops import topk_mask, topk_mask_with_bits, pack_sparse, unpack_sparse
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.randn(3, 70, requires_grad=True)
        for _ in range(3):
            y, bits = topk_mask_with_bits(x, 9)
            y.sum().backward()
        assert torch.equal(unpack_sparse(*pack_sparse(y, bits, 9), 70), y)
        assert torch.compile(topk_mask, fullgraph=True, backend="aot_eager")(x, 9).equal(y)
    ours = [w for w in caught if w.category.__name__ == "TopKFallbackWarning"]
    print(len(ours), ours[0].message)
"""


def test_a_missing_library_is_reported_once(tmp_path: Path) -> None:
    out = run_without_library(WARN_SCRIPT, tmp_path)
    assert out.startswith("1 topk_mask runs on cpu through its reference")
    assert "it was not built" in out


def test_the_warning_carries_the_build_error(tmp_path: Path) -> None:
    out = run_without_library(WARN_SCRIPT, tmp_path, build_error="c++: error: no such option")
    assert out.startswith("1 ")
    assert "building it failed:\nc++: error: no such option" in out


def test_a_library_that_cannot_be_loaded_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "_topk_mask_cpu.so").write_bytes(b"not a library")
    reason = extension.load_library("cpu", tmp_path)
    assert reason is not None
    assert "_topk_mask_cpu.so cannot be loaded" in reason


@pytest.mark.filterwarnings("ignore::topk_megatron.ops.TopKFallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fallback_and_kernel_agree(kernels: None, dtype: torch.dtype) -> None:
    x = make_rows("few_distinct", (5, 3 * 50), dtype).view(5, 3, 50)
    y, bits = torch.ops.topk_megatron.topk_mask(x, 11, "abs")
    fallback_y, fallback_bits = _topk_mask_fallback(x, 11, "abs")
    assert torch.equal(as_bits(y), as_bits(fallback_y))
    assert torch.equal(bits, fallback_bits)
    dx = torch.ops.topk_megatron.topk_mask_backward(x, bits)
    assert torch.equal(as_bits(dx), as_bits(_topk_mask_backward_fallback(x, bits)))
