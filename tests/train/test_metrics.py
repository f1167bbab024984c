"""Statistics of TopK layers on the console and in Weights & Biases (TensorBoard: test_layouts)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.launch import TINY_MODEL, TINY_TRAINING, pretrain
from topk_megatron.config import TopKConfig
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.train import metrics as metrics_module
from topk_megatron.train.metrics import LayerMetrics, format_metrics, gather_metrics

MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511"]


def test_console_line_has_a_column_per_layer() -> None:
    config = TopKConfig(hidden_size=64, num_layers=4, k=8, layers=(0, 2))
    metrics = [
        LayerMetrics(layer=0, density=0.125, kept_norm=0.5, silent=0.0),
        LayerMetrics(layer=2, density=0.125, kept_norm=0.75, silent=1 / 64),
    ]
    line = format_metrics(30, TopKRuntime(config), metrics)
    assert "k: 8 of 64" in line
    assert "density %: 12.5 12.5" in line
    assert "kept norm² %: 50 75" in line
    assert "silent %: 0 1.56" in line


class _Reads(TorchDispatchMode):
    """Counts the values that are read back from a tensor one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_the_device_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    read = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        calls["tolist"] += 1
        return read(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(metrics_module.dist, "all_reduce", lambda *_, **__: None)
    runtime = TopKRuntime(TopKConfig(hidden_size=64, num_layers=4, k=8, layers=(0, 2, 3)))
    with _Reads() as reads:
        for layer in (0, 2):  # layer 3 is on another rank
            runtime.register(layer)
        runtime.begin_step(0, measuring=True)
        for layer in (0, 2):
            runtime.apply(torch.randn(9, 64), layer, training=True)
        for probe in runtime.probes.values():
            probe.end_step(9)
        assert not calls
        found = gather_metrics(runtime, silent_tokens=9, seen_tokens=9)
    assert calls == {"tolist": 1}
    assert reads.count == 0
    assert [m.density for m in found] == [0.125, 0.125, 0.0]
    assert all(0 < m.kept_norm < 1 for m in found[:2])


@pytest.mark.distributed
def test_weights_and_biases_gets_the_layers_offline(tmp_path: Path) -> None:
    flags = [*TINY_MODEL, *TINY_TRAINING, *MOCK, "--train-iters", "2", "--topk-k", "8"]
    wandb = ["--wandb-project", "topk", "--wandb-exp-name", "test", "--wandb-save-dir", tmp_path]
    run = pretrain(1, *flags, *wandb, environment={"WANDB_MODE": "offline"})
    assert run.returncode == 0, run.output
    (log,) = tmp_path.rglob("*.wandb")
    written = log.read_bytes()
    for name in ("topk/k", "topk/density/layer_00", "topk/silent/layer_01"):
        assert name.encode() in written


@pytest.mark.distributed
def test_statistics_can_be_switched_off() -> None:
    flags = [*TINY_MODEL, *TINY_TRAINING, *MOCK, "--train-iters", "2", "--topk-k", "8"]
    run = pretrain(1, *flags, "--no-topk-metrics")
    assert run.returncode == 0, run.output
    assert "kept norm" not in run.output
