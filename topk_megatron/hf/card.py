"""Writes the model card: what the model is, how to open it, and how it was trained."""

import json
from typing import Any

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- topk-language-model
- interpretability
- megatron
---
"""

_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)
batch = tokenizer("Once upon a time", return_tensors="pt")
model.generate(**batch, max_new_tokens=32)
```

The folder contains the model's code, which needs only torch and transformers.
"""

_STATES = """
```python
with model.sparse_states() as states:  # the outputs of the TopK layers
    model(**batch)
states[{layer}].values, states[{layer}].indices  # [b, s, k] each
```
"""


def model_card(config: dict[str, Any], training: dict[str, Any]) -> str:
    """Return README.md of an exported folder, from its config.json and topk_training.json."""
    topk = config["topk"]
    title = "# TopK language model\n" if topk["layers"] else "# Language model (dense)\n"
    states = _STATES.format(layer=topk["layers"][-1]) if topk["layers"] else ""
    parts = [_FRONT, title, _summary(config), _USE + states, _settings(config, training)]
    arguments = json.dumps(training["megatron_args"], indent=1, sort_keys=True)
    fold = f"<details><summary>All arguments</summary>\n\n```json\n{arguments}\n```\n\n</details>\n"
    return "\n".join([*parts, fold])


def _summary(config: dict[str, Any]) -> str:
    topk = config["topk"]
    if not topk["layers"]:
        return "A decoder without TopK layers, exported from Megatron.\n"
    return (
        f"A decoder whose hidden states after layers {_ranges(topk['layers'])} keep "
        f"{topk['k']} of {config['hidden_size']} neurons and are zero elsewhere (TopK language "
        "models, arXiv 2506.21468). Neuron *i* is the same coordinate at every one of these "
        "layers.\n"
    )


def _settings(config: dict[str, Any], training: dict[str, Any]) -> str:
    topk, run = config["topk"], training["topk"]
    rows = [
        ("layers", f"{config['num_hidden_layers']}"),
        ("hidden size", f"{config['hidden_size']}"),
        ("vocabulary", f"{config['vocab_size']}"),
        ("training iterations", f"{training['iteration']}"),
        ("training tokens", f"{training['tokens_seen']}"),
    ]
    if topk["layers"]:
        rows += [(f"TopK: {name}", f"`{topk[name]}`") for name in sorted(topk)]
    if run is not None and run["anneal"] != "constant":
        rows.append(("TopK: k by the end of training", f"`{run['k']}` ({run['anneal']} anneal)"))
    arguments = training["megatron_args"]
    rows += [(name, f"`{arguments[name]}`") for name in _SHOWN if name in arguments]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines, ""])


_SHOWN = (
    "seq_length",
    "global_batch_size",
    "optimizer",
    "lr",
    "lr_decay_style",
    "weight_decay",
    "params_dtype",
    "seed",
    "data_path",
)


def _ranges(layers: list[int]) -> str:
    """Write layers as in ``0 to 3, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
