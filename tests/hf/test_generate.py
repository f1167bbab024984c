"""tools/generate.py: repeatable text, pushes that are the model's own, errors in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run_tool
from tests.hf.models import make_folder
from topk_megatron.hf import Intervention

pytestmark = pytest.mark.slow
PROMPT = "def main("


@pytest.fixture(scope="module")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("generate") / "model", tokenizer)


def generate(folder: Path, *flags: str) -> Any:
    return run_tool("generate.py", "--model", folder, "--prompt", PROMPT, "--tokens", "12", *flags)


def test_equal_seeds_give_equal_text_and_others_do_not(folder: Path) -> None:
    first, again, other = (generate(folder, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(PROMPT)
    assert first.stdout == again.stdout != other.stdout


def test_a_pushed_neuron_writes_what_the_model_writes_when_it_is_pushed(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    texts = []
    for changes in ([], [Intervention(layer=1, neuron=17, op="set", value=30.0)]):
        with model.intervene(*changes), torch.no_grad():
            written = model.generate(tokens, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))
    plain = generate(folder, "--temperature", "0")
    pushed = generate(folder, "--temperature", "0", "--neuron", "1:17", "--set", "30")
    assert [plain.stdout, pushed.stdout] == [f"{PROMPT}{text}\n\n" for text in texts]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--neuron", "7:3", "--set", "1"], "layer 7 has no TopK at the residual site"),
        (["--neuron", "1:64", "--ablate"], "neuron must be in [0, 63], got 64"),
        (["--neuron", "1.5", "--set", "1"], "belong together; got --neuron 1.5 and set"),
        (["--neuron", "1:3"], "no operation"),
        (["--tokens", "64"], "must be at most 64"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(
    flags: list[str], complaint: str, folder: Path
) -> None:
    done = generate(folder, *flags)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
