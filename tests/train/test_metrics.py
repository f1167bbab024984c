"""Statistics of TopK layers on the console and in Weights & Biases (TensorBoard: test_layouts)."""

from pathlib import Path

import pytest

from tests.harness.launch import TINY_MODEL, TINY_TRAINING, pretrain
from topk_megatron.config import TopKConfig
from topk_megatron.model.runtime import TopKRuntime
from topk_megatron.train.metrics import LayerMetrics, format_metrics

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
