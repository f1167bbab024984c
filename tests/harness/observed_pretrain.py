"""Pretraining that checks every row of every TopK layer: exactly k neurons survive.

An entry for `tests.harness.launch.pretrain`. Each rank writes the number of rows checked, by layer,
to ``rank<N>.json`` in the directory TOPK_OBSERVED.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat import prepare_device
from topk_megatron.model import runtime
from topk_megatron.ops import topk_mask_with_bits
from topk_megatron.ops.reference import unpack_bits


@exit_on_user_error
def main() -> None:
    """Train, and count survivors by their mask, so that a kept zero counts too."""
    device = prepare_device()
    rows: Counter[int] = Counter()
    original = runtime.TopKRuntime.apply

    def apply(
        self: runtime.TopKRuntime, hidden_states: Tensor, layer: int, *, training: bool
    ) -> Tensor:
        output = original(self, hidden_states, layer, training=training)
        mode = self.config.mode
        expected, bits = topk_mask_with_bits(hidden_states.detach(), self.k, mode=mode)
        survivors = unpack_bits(bits, self.config.hidden_size).sum(-1)
        assert (survivors == self.k).all(), (layer, self.k, survivors.unique())
        assert (output.detach() == expected).all(), f"layer {layer} is not its own top {self.k}"
        rows[layer] += survivors.numel()
        return output

    runtime.TopKRuntime.apply = apply
    from topk_megatron.train.main import run

    run(device)
    assert not dist.is_initialized(), "the process groups outlive the run"
    directory = Path(os.environ["TOPK_OBSERVED"])
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
