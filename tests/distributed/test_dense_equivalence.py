"""With k equal to the hidden size, the TopK model is Megatron's own GPT model bit for bit."""

import json
from pathlib import Path

import pytest

from tests.harness.launch import pretrain

pytestmark = [pytest.mark.distributed]


# Both models have the same core attention, or its rounding would be compared too. Under "unfused"
# the stock model is built from Megatron's spec itself; under "auto" its core attention is ours.
ATTENTION = {"unfused": "DotProductAttention", "auto": "FusedAttention"}


@pytest.mark.parametrize("backend", ATTENTION)
def test_k_of_the_hidden_size_has_the_stock_models_losses_and_gradients_bitwise(
    backend: str, flags: list[str], tmp_path: Path
) -> None:
    settings = ["--topk-k", "64", "--topk-layers", "all", "--attention-backend", backend]
    run = pretrain(
        1,
        *flags,
        *settings,
        entry=Path(__file__).with_name("compare_with_stock.py"),
        environment={"TOPK_REPORT": str(tmp_path / "report.json")},
    )
    assert run.returncode == 0, run.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stock_layers"] == ["TransformerLayer"]
    assert report["topk_layers"] == ["TopKTransformerLayer"]
    assert report["attention"] == [ATTENTION[backend]]
    assert len(report["steps"]) == 20
    assert all(step["loss_equal"] and step["gradients_equal"] for step in report["steps"])
    # The comparison must be able to fail: with k = H - 1 the gradients differ in the first step.
    assert not report["one_neuron_fewer"]["gradients_equal"]
