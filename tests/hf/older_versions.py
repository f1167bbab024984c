"""Continues what `test_versions.py` saved, under transformers 4.57; one process for all of it."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4.57."), transformers.__version__

for folder in sorted(Path(sys.argv[1]).glob("*/model")):
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.load(folder.parent / "tokens.pt", weights_only=True)
    greedy = model.generate(tokens, max_new_tokens=64, do_sample=False, eos_token_id=None)
    torch.save(greedy, folder.parent / "greedy.pt")
    model.save_pretrained(folder.parent / "model-from-4")
