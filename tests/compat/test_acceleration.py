"""Transformer Engine and Apex are used if they are installed, and missing ones are named.

These tests need no GPU: they make the packages as empty folders. tests/gpu tests what the real
packages compute.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import textwrap
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.transformer.enums import AttnBackend

from tests.harness.launch import REPOSITORY
from topk_megatron.compat.accelerators import (
    _NEED_LAYERS,
    _NEED_PACKAGE,
    SOFTMAX_MODULES,
    Accelerators,
    check_accelerators,
    check_gpus,
    describe,
    find_no_compiler,
    gpu_defaults,
    missing_defaults,
)
from topk_megatron.errors import ConfigError

NOTHING = Accelerators()
NGC_IMAGE = Accelerators("2.9.0", None, apex=True, fused_gradients=True, fused_softmax=True)
PIP = Accelerators("2.9.0")
BROKEN = Accelerators(broken="OSError: libcudnn.so.9: cannot open shared object file")


def arguments(**changes: object) -> Namespace:
    settings = {
        "transformer_impl": "transformer_engine",
        "fp8": None,
        "fp4": None,
        "context_parallel_size": 1,
        "defer_embedding_wgrad_compute": False,
        "normalization": "LayerNorm",
        "use_checkpoint_args": False,
        "attention_backend": AttnBackend.auto,
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


def off(found: Accelerators, **changes: object) -> dict[str, object]:
    return {item.argument: item.value for item in missing_defaults(found, arguments(**changes))}


def test_nothing_changes_if_everything_is_installed() -> None:
    assert gpu_defaults(NGC_IMAGE) == {}
    assert off(NGC_IMAGE) == {}
    assert off(NGC_IMAGE, transformer_impl="local") == {}


def test_without_either_megatron_uses_its_own_layers_and_nothing_that_is_not_there() -> None:
    assert gpu_defaults(NOTHING) == gpu_defaults(BROKEN) == {"transformer_impl": "local"}
    assert off(NOTHING, transformer_impl="local") == {
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }


def test_transformer_engine_from_pypi_runs_without_apex() -> None:
    assert gpu_defaults(PIP) == {}
    assert off(PIP) == {"gradient_accumulation_fusion": False}


def test_local_layers_beside_transformer_engine_get_torchs_norms_and_softmax() -> None:
    """Megatron's norm of torch asserts that it is not persistent."""
    assert off(PIP, transformer_impl="local") == {
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    assert off(PIP, attention_backend=AttnBackend.local)["masked_softmax_fusion"] is False


@pytest.mark.parametrize("changes", [{"normalization": "RMSNorm"}, {"use_checkpoint_args": True}])
def test_apex_has_no_persistent_rms_norm(changes: dict[str, object]) -> None:
    found = replace(NGC_IMAGE, transformer_engine=None)
    assert "no_persist_layer_norm" not in off(found, transformer_impl="local")
    assert off(found, transformer_impl="local", **changes)["no_persist_layer_norm"] is True


def test_without_a_compiler_nothing_relies_on_torch_compile() -> None:
    fusions = {f"bias_{name}_fusion": False for name in ("gelu", "swiglu", "dropout")}
    assert off(replace(NGC_IMAGE, no_compiler="a C compiler")) == fusions


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert find_no_compiler() == "Python.h (package python3-dev)"
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert find_no_compiler() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_no_compiler() == "a C compiler"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert find_no_compiler() == "Triton"


@pytest.mark.parametrize(("compiler", "value"), [("/no/compiler", "1"), ("gcc", "None")])
def test_a_gpu_without_a_compiler_runs_megatrons_compiled_functions_as_python(
    compiler: str, value: str, tmp_path: Path
) -> None:
    done = python(
        f"""
        import os, shutil, sysconfig
        import torch
        torch.cuda.is_available = lambda: True
        os.environ.pop("CC", None)
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
        shutil.which = lambda name: {compiler!r} if {compiler!r} == name else None
        sysconfig.get_paths = lambda: {{"include": {str(tmp_path)!r}}}
        open({str(tmp_path / "Python.h")!r}, "w").close()
        from topk_megatron.compat import prepare_device
        assert prepare_device() == "cuda"
        print(os.environ.get("TORCHDYNAMO_DISABLE"))
        """,
        tmp_path,
    )
    assert done.stdout.strip() == value, done.stderr


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, "--transformer-impl transformer_engine"),
        ({"transformer_impl": "local", "fp8": "hybrid"}, "--fp8-format"),
        ({"transformer_impl": "local", "fp4": "e2m1"}, "--fp4-format"),
        ({"transformer_impl": "local", "context_parallel_size": 2}, "--context-parallel-size"),
        ({"transformer_impl": "local", "tp_comm_overlap": True}, "--tp-comm-overlap"),
        ({"transformer_impl": "local", "multi_latent_attention": True}, "--multi-latent-attention"),
        ({"transformer_impl": "local", "moe_permute_fusion": True}, "--moe-permute-fusion"),
        ({"transformer_impl": "local", "moe_router_fusion": True}, "--moe-router-fusion"),
        (
            {"transformer_impl": "local", "use_precision_aware_optimizer": True},
            "--use-precision-aware-optimizer",
        ),
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


def test_flags_that_need_the_package_alone_pass_with_local_layers() -> None:
    flags = {"moe_permute_fusion": True, "use_precision_aware_optimizer": True}
    check_accelerators(arguments(transformer_impl="local", **flags), PIP)


def test_deferred_weight_gradients_need_apex() -> None:
    args = arguments(defer_embedding_wgrad_compute=True)
    check_accelerators(args, NGC_IMAGE)
    with pytest.raises(ConfigError, match="needs NVIDIA Apex's fused_weight_gradient_mlp_cuda"):
        check_accelerators(args, PIP)


def test_every_argument_exists_in_megatron() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    idle = {action.dest: action.default for action in parser._actions}
    for name, value in (_NEED_LAYERS | _NEED_PACKAGE).values():
        assert idle[name] == value
    found = replace(NOTHING, no_compiler="Triton")
    for name, value in off(found, transformer_impl="local").items():
        assert idle[name] is (not value)


def test_one_line_says_what_runs_and_what_is_not_fused_for_want_of_what() -> None:
    assert describe(NGC_IMAGE, arguments()) == "topk_megatron: layers: Transformer Engine 2.9.0"
    assert describe(PIP, arguments()) == (
        "topk_megatron: layers: Transformer Engine 2.9.0; not fused: weight gradients "
        "(needs fused_weight_gradient_mlp_cuda of NVIDIA Apex)"
    )
    local = arguments(transformer_impl="local")
    assert describe(NOTHING, local) == (
        "topk_megatron: layers: Megatron's own (Transformer Engine is not installed); not fused: "
        "rotary embedding (needs Transformer Engine); persistent norm (needs NVIDIA Apex); "
        "weight gradients (needs fused_weight_gradient_mlp_cuda of NVIDIA Apex); "
        "masked softmax (needs scaled_masked_softmax_cuda of NVIDIA Apex)"
    )
    assert "does not load: OSError" in describe(BROKEN, local)
    no_compiler = describe(replace(NGC_IMAGE, no_compiler="a C compiler"), arguments())
    assert "bias and GELU, bias and SwiGLU, bias and dropout (needs a C compiler)" in no_compiler


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
    found = Accelerators("2.8.0", None, apex=True, fused_gradients=True)
    assert done.stdout.strip() == str(replace(found, no_compiler=find_no_compiler()))


def test_the_fused_softmax_needs_all_its_modules(tmp_path: Path) -> None:
    for module in SOFTMAX_MODULES:
        assert "fused_softmax=False" in python(FOUND, tmp_path).stdout
        (tmp_path / f"{module}.py").touch()
    assert "fused_softmax=True" in python(FOUND, tmp_path).stdout


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
    for name in ("check_accelerators", "check_attention"):
        monkeypatch.setattr(checks, name, lambda *_: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = TopKConfig(hidden_size=8, num_layers=1, k=2, layers=(0,))
    checks.check_arguments(Namespace(local_rank=0), config, "cuda")
    with pytest.raises(ConfigError, match="NCCL needs a GPU for each rank"):
        checks.check_arguments(Namespace(local_rank=1), config, "cuda")
    monkeypatch.setattr(checks, "_check_cpu", lambda *_: None)
    checks.check_arguments(Namespace(local_rank=1), config, "cpu")
