"""The tools that analysts use open an exported folder unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.harness.forks import REPOSITORY
from tests.hf.models import HIDDEN, K, make_folder

pytestmark = pytest.mark.slow
PROMPT = "def main(args: list[str]) -> None:"


@pytest.fixture(scope="module")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("interop") / "model", tokenizer)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokens(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def expected(model: Any, tokens: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(tokens, output_hidden_states=True)


def test_nnsight_traces_and_changes_the_sparse_states(
    folder: Path, tokens: torch.Tensor, expected: Any, tmp_path: Path
) -> None:
    output = tmp_path / "traced.pt"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.hf.traced", str(folder), str(output)),
            *(str(token) for token in tokens[0].tolist()),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(output)
    assert torch.equal(found["state"], expected.hidden_states[2])
    assert found["logits"].shape == expected.logits.shape
    assert not torch.equal(found["logits"], expected.logits)
    assert not hasattr(object, "save"), "nnsight was imported into the process of the tests"


def test_transformer_bridge_boots_it_and_sees_the_sparse_states(
    folder: Path, tokens: torch.Tensor, expected: Any
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(
        str(folder),
        trust_remote_code=True,
        hf_config_overrides={"original_architecture": "LlamaForCausalLM"},
        device="cpu",
        dtype=torch.float32,
    )
    logits, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    state = cache["blocks.1.hook_out"]
    assert ((state != 0).sum(-1) == K).all()
    torch.testing.assert_close(state, expected.hidden_states[2], atol=1e-5, rtol=0)


def test_saelens_wraps_the_states_in_an_identity_sae(expected: Any) -> None:
    from topk_megatron.hf.identity_sae import identity_sae

    state = expected.hidden_states[2]
    sae = identity_sae(hidden_size=HIDDEN, hook_name="blocks.1.hook_out")
    encoded = sae.encode(state)
    assert torch.equal(encoded, state)
    assert torch.equal(sae.decode(encoded), state)
    assert torch.equal(sae(state), state)
    assert sae.cfg.d_sae == sae.cfg.d_in == HIDDEN


def test_lm_eval_scores_it_by_its_own_command_line(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"def f{n}(x):", "choices": [" return", "import"], "answer": 0} for n in "abc"]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\n'
        'target_delimiter: ""\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n"
    )
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments),
            *("--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|tiny |" in done.stdout
