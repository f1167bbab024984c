"""Transformer Engine and Apex are used if they are installed, and missing ones are named.

These tests need no GPU: they make the packages as empty folders. tests/gpu tests what the real
packages compute.
"""

import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY
from topk_megatron.compat.accelerators import (
    Accelerators,
    check_accelerators,
    check_gpus,
    describe,
    gpu_defaults,
)
from topk_megatron.errors import ConfigError

NOTHING = Accelerators()
NGC_IMAGE = Accelerators("2.9.0", None, apex=True, fused_gradients=True)
PIP = Accelerators("2.9.0")
BROKEN = Accelerators(broken="OSError: libcudnn.so.9: cannot open shared object file")


def arguments(**changes: object) -> Namespace:
    settings = {
        "transformer_impl": "transformer_engine",
        "fp8": None,
        "fp4": None,
        "context_parallel_size": 1,
        "gradient_accumulation_fusion": True,
    }
    return Namespace(**{**settings, **changes})


def python(code: str, path: Path) -> "subprocess.CompletedProcess[str]":
    """Run code with `path` first on Python's search path."""
    search = os.pathsep.join([str(path), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": search},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


def package(path: Path, *modules: str) -> None:
    for name in modules:
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / name / "__init__.py").touch()


def test_nothing_changes_if_everything_is_installed() -> None:
    assert gpu_defaults(NGC_IMAGE) == {}


def test_without_either_megatron_uses_its_own_layers_and_plain_accumulation() -> None:
    defaults = gpu_defaults(NOTHING)
    assert defaults["transformer_impl"] == "local"
    assert defaults["no_persist_layer_norm"] is True
    assert defaults["gradient_accumulation_fusion"] is False


def test_transformer_engine_from_pypi_runs_without_apex_fusion() -> None:
    assert gpu_defaults(PIP) == {"gradient_accumulation_fusion": False}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, "--transformer-impl transformer_engine"),
        ({"transformer_impl": "local", "fp8": "hybrid"}, "--fp8-format"),
        ({"transformer_impl": "local", "fp4": "e2m1"}, "--fp4-format"),
        ({"transformer_impl": "local", "context_parallel_size": 2}, "--context-parallel-size"),
    ],
)
def test_a_flag_that_needs_transformer_engine_says_so(
    changes: dict[str, object], flag: str
) -> None:
    with pytest.raises(ConfigError, match=r"needs Transformer Engine, which is not") as e:
        check_accelerators(arguments(**changes), NOTHING)
    assert str(e.value).startswith(flag)
    with pytest.raises(ConfigError, match=r"does not load here .*libcudnn"):
        check_accelerators(arguments(**changes), BROKEN)


def test_fp8_passes_with_transformer_engine_and_is_refused_with_local_layers() -> None:
    check_accelerators(arguments(fp8="hybrid"), PIP)
    with pytest.raises(ConfigError, match="--fp8-format needs Transformer Engine's layers"):
        check_accelerators(arguments(fp8="hybrid", transformer_impl="local"), PIP)


def test_one_line_says_what_runs() -> None:
    assert "Transformer Engine 2.9.0; NVIDIA Apex; gradient accumulation fused" in describe(
        NGC_IMAGE, arguments()
    )
    local = arguments(transformer_impl="local", gradient_accumulation_fusion=False)
    assert "Megatron's own; no Apex; gradient accumulation not fused" in describe(NOTHING, local)
    assert "does not load: OSError" in describe(BROKEN, local)


FOUND = """
    from topk_megatron.compat.accelerators import find_accelerators
    print(find_accelerators())
"""


def test_packages_on_disk_are_found(tmp_path: Path) -> None:
    package(tmp_path, "transformer_engine", "transformer_engine/pytorch")
    (tmp_path / "transformer_engine/__init__.py").write_text("__version__ = '2.8.0'\n")
    package(tmp_path, "apex", "apex/multi_tensor_apply", "apex/normalization", "apex/optimizers")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    done = python(FOUND, tmp_path)
    assert done.stdout.strip() == str(Accelerators("2.8.0", None, apex=True, fused_gradients=True))


def test_a_transformer_engine_without_its_torch_part_is_broken_not_present(tmp_path: Path) -> None:
    package(tmp_path, "transformer_engine")
    done = python(FOUND, tmp_path)
    assert "transformer_engine=None" in done.stdout
    assert "broken=\"ModuleNotFoundError: No module named 'transformer_engine.pytorch'" in (
        done.stdout
    )


def test_pypis_apex_is_named_as_the_wrong_package_before_megatron_runs(tmp_path: Path) -> None:
    package(tmp_path, "apex", "apex/lib")  # as PyPI's 0.9.10.dev0 is laid out
    done = subprocess.run(
        [sys.executable, "pretrain_topk_gpt.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: the package apex in {tmp_path / 'apex'} is not NVIDIA Apex")
    assert "pip uninstall apex" in line


def test_a_clone_of_apex_in_the_working_folder_is_not_mistaken_for_it(tmp_path: Path) -> None:
    (tmp_path / "apex" / "csrc").mkdir(parents=True)
    done = python(
        "from topk_megatron.compat.accelerators import check_apex; check_apex()", tmp_path
    )
    assert "is a folder that Python imports as `apex`" in done.stderr


def test_on_a_cpu_megatron_finds_neither(tmp_path: Path) -> None:
    package(tmp_path, "transformer_engine", "transformer_engine/pytorch")
    package(tmp_path, "apex", "apex/multi_tensor_apply", "apex/normalization", "apex/optimizers")
    done = python(
        """
        import torch
        torch.cuda.is_available = lambda: False
        from topk_megatron.compat import prepare_device
        assert prepare_device() == "cpu"
        from megatron.core.extensions.transformer_engine import HAVE_TE
        from megatron.core.transformer.transformer_block import HAVE_APEX
        assert not HAVE_TE and not HAVE_APEX
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_more_ranks_than_gpus_are_refused_with_the_number_to_start() -> None:
    check_gpus(0, 1)
    check_gpus(7, 8)
    with pytest.raises(ConfigError, match=r"1 GPU .* at least 2 ranks.* --nproc-per-node 1$"):
        check_gpus(1, 1)
    with pytest.raises(ConfigError, match=r"4 GPUs .* at least 5 ranks.* --nproc-per-node 4$"):
        check_gpus(4, 4)


def test_a_training_run_counts_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from topk_megatron.config import TopKConfig
    from topk_megatron.train import checks

    for name in ("check_settings", "_check_world_size", "_check_unsupported", "_check_files"):
        monkeypatch.setattr(checks, name, lambda *_: None)
    monkeypatch.setattr(checks, "check_accelerators", lambda *_: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = TopKConfig(hidden_size=8, num_layers=1, k=2, layers=(0,))
    checks.check_arguments(Namespace(local_rank=0), config, "cuda")
    with pytest.raises(ConfigError, match="NCCL needs a GPU for each rank"):
        checks.check_arguments(Namespace(local_rank=1), config, "cuda")
    monkeypatch.setattr(checks, "_check_cpu", lambda *_: None)
    checks.check_arguments(Namespace(local_rank=1), config, "cpu")
