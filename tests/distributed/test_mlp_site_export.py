"""A model with TopK inside its MLPs has Megatron's logits when Hugging Face loads it.

Tolerance: 2e-5 of the largest logit, a few hundred units in the last place of float32, because the
two multiply the same matrices in a different order. A selection that differs in one unit costs
1e-3.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.launch import REPOSITORY, pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 2e-5
MODELS = {
    "gated": "--topk-site both --topk-k 16 --topk-mlp-k 24",
    "experts-in-groups": (
        "--topk-site mlp --topk-mode abs --topk-mlp-k 12 --topk-mlp-groups 4 "
        "--num-experts 4 --moe-router-topk 2 --moe-shared-expert-intermediate-size 32"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_exported_model_has_the_logits_of_megatron(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, folder, logits = tmp_path / "megatron", tmp_path / "hf", tmp_path / "logits.pt"
    run = pretrain(
        1,
        *(
            *flags,
            "--topk-layers",
            "0-2",
            *MODELS[name].split(),
            "--save",
            checkpoint,
            "--save-interval",
            "4",
        ),
        entry=Path(__file__).with_name("reference_logits.py"),
        environment={"TOPK_LOGITS": str(logits)},
    )
    assert run.returncode == 0, run.output
    tool = str(REPOSITORY / "tools" / "convert_checkpoint.py")
    command = [sys.executable, tool, "to-hf", "--load", str(checkpoint), "--save", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    tokens, wanted = torch.load(logits)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        got = model(tokens).logits
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        # The comparison can fail: one more unit in every group changes the logits.
        activations: list[Any] = [
            m for n, m in model.named_modules() if ".mlp." in n and n.endswith(".topk")
        ]
        for activation in activations:
            activation.k += activation.groups
        other = model(tokens).logits
        assert (other - wanted).abs().max() > 10 * TOLERANCE * wanted.abs().max()
