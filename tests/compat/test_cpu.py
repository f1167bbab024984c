"""The CPU layer, each case in its own process, because the layer patches torch for good."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def passes(code: str) -> None:
    done = python(f"from topk_megatron.compat import prepare_device\n{textwrap.dedent(code)}")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_patches_nothing() -> None:
    done = python(
        """
        import topk_megatron, topk_megatron.config, topk_megatron.ops
        import torch, sys
        assert not torch.cuda.is_available()
        assert not any(name.startswith("megatron") for name in sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr


def test_cuda_factories_and_moves_land_on_the_cpu() -> None:
    passes(
        """
        import torch
        assert prepare_device() == "cpu" and prepare_device() == "cpu"
        for made in (
            torch.zeros(2, device="cuda"), torch.tensor([1.0], device="cuda:0"),
            torch.empty(2, device=torch.device("cuda")), torch.arange(3, device=0),
            torch.ones(2).cuda(), torch.ones(2).to("cuda"), torch.ones(2).to(device="cuda"),
            torch.empty_like(torch.ones(2), device="cuda"),
            torch.ones(1).new_zeros(2, device="cuda"),
            torch.empty(2, pin_memory=True), torch.ones(2).pin_memory(),
        ):
            assert made.device.type == "cpu", made.device
        assert torch.ones(2).to(torch.float64).dtype == torch.float64
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        """
    )


def test_forward_mode_knows_the_factories() -> None:
    """torch scripts decompositions, which call factories, when forward mode is first used."""
    passes(
        """
        prepare_device()
        import torch
        from torch.autograd import forward_ad
        x, tangent = torch.ones(2), torch.full((2,), 3.0)
        with forward_ad.dual_level():
            y = forward_ad.make_dual(x, tangent) * torch.zeros_like(x).add(2)
            assert torch.equal(forward_ad.unpack_dual(y).tangent, tangent * 2)
        """
    )


def test_tensor_types_are_those_that_megatron_expects() -> None:
    passes(
        """
        import torch
        prepare_device()
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert isinstance(torch.ones(1), torch.cuda.FloatTensor)
        assert not isinstance(torch.ones(1), torch.cuda.HalfTensor)
        assert not isinstance("text", torch.cuda.FloatTensor)
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        """
    )


def test_torch_itself_still_sees_no_accelerator() -> None:
    passes(
        """
        import torch
        prepare_device()
        assert torch.cuda.is_available()
        assert not torch.accelerator.is_available()
        assert torch.accelerator.current_accelerator() is None
        loader = torch.utils.data.DataLoader(range(4), batch_size=2, pin_memory=True)
        state = torch.get_rng_state()
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
        assert torch.equal(torch.get_rng_state(), state), "the loader drew from it"
        """
    )


def test_random_state_tracker_gives_each_region_its_own_stream() -> None:
    passes(
        """
        import torch
        prepare_device()
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(1)
        tracker.add("a", 7)
        outside = torch.get_rng_state()
        with tracker.fork("a"):
            first = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), outside)
        with tracker.fork("a"):
            second = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(torch.cat([first, second]), torch.rand(6))
        """
    )


def test_events_measure_host_time_in_milliseconds() -> None:
    passes(
        """
        import time, torch
        prepare_device()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); time.sleep(0.05); end.record()
        assert 45 < start.elapsed_time(end) < 1000
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().synchronize()
        """
    )


OTHER_LIBRARY = """
import torch

def look():
    return torch.cuda.is_available(), torch.cuda.device_count(), torch.ones(1).type()

def fails(make):
    try:
        make()
    except (RuntimeError, AssertionError, NotImplementedError):
        return True
    return False

def moves():
    return [
        fails(lambda: torch.zeros(2, device="cuda")), fails(lambda: torch.ones(2).cuda()),
        fails(lambda: torch.ones(2).to("cuda")), fails(lambda: torch.nn.Linear(2, 2).cuda()),
    ]
"""


def test_other_libraries_see_no_cuda_device(tmp_path: Path) -> None:
    """A module that is neither Megatron's nor ours must not choose a device that is missing."""
    (tmp_path / "somebody.py").write_text(OTHER_LIBRARY)
    passes(
        f"""
        import sys, torch
        sys.path.insert(0, {str(tmp_path)!r})
        import somebody
        before = somebody.look(), somebody.moves()
        prepare_device()
        assert (somebody.look(), somebody.moves()) == before
        assert before == ((False, 0, "torch.FloatTensor"), [True] * 4)
        assert torch.cuda.is_available() and torch.zeros(2, device="cuda").device.type == "cpu"
        """
    )


def test_tensors_follow_a_device_context() -> None:
    passes(
        """
        import torch
        prepare_device()
        with torch.device("meta"):
            made = [torch.empty(2), torch.arange(3), torch.tensor([1.0]), torch.eye(2)]
            assert torch.nn.Linear(2, 2).weight.is_meta
        assert all(tensor.is_meta for tensor in made)
        assert torch.empty(2, device="meta").is_meta and torch.ones(2).to("meta").is_meta
        """
    )


def test_transformers_fills_the_buffers_of_a_model_that_it_loads(tmp_path: Path) -> None:
    """It builds on the meta device; in uninitialised memory, RoPE's frequencies were garbage."""
    passes(
        f"""
        prepare_device()
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
        LlamaForCausalLM(config).save_pretrained({str(tmp_path)!r})
        model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r})
        expected = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
        """
    )


def test_our_analysis_sees_no_cuda_device_beside_a_training_run() -> None:
    """Both may live in one process; a model must not be moved to a device that is not there."""
    passes(
        """
        prepare_device()
        from topk_megatron.hf.model import _device
        assert _device(None).type == "cpu"
        """
    )
