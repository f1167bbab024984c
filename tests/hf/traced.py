"""Traces an exported model with nnsight: python -m tests.hf.traced FOLDER OUTPUT TOKEN...

Saves in OUTPUT the states of the second layer, and the logits with those states set to 0. This is a
program of its own because importing nnsight gives every object a method `save`. argparse then takes
a namespace to have its `save` already, and ``--save`` loses its default in the whole process.
"""

import sys
from typing import Any

import torch
from nnsight import LanguageModel


def main(folder: str, output: str, *tokens: str) -> None:
    """Trace the model and write the results."""
    traced: Any = LanguageModel(folder, trust_remote_code=True, dispatch=True)
    inputs = torch.tensor([[int(token) for token in tokens]])
    with traced.trace(inputs):
        state = traced.model.layers[1].topk.output.save()
    with traced.trace(inputs):
        traced.model.layers[1].topk.output[:] = 0
        logits = traced.lm_head.output.save()
    torch.save({"state": state.detach(), "logits": logits.detach()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
