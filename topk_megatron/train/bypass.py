"""Stops a run in which a TopK layer ran without its TopK.

Megatron has many ways through a layer, and a flag, a spec or a new version can open another. A run
that leaves a TopK out would train a different model without a word, so the first step of a run
checks that every TopK was applied.
"""

from typing import Any

import torch.distributed as dist

from topk_megatron.errors import ConfigError
from topk_megatron.model.runtime import Site, TopKRuntime


def check_applied(runtime: TopKRuntime, *, training: bool, when: str) -> None:
    """Check that every TopK site of every rank was applied; every rank must call this.

    Args:
        runtime: the TopK layers of this rank.
        training: whether to check the applications in training or those in evaluation.
        when: what has just run, for the message.

    Raises:
        ConfigError: on every rank, so that all of them stop; it names the layers.
    """
    if not runtime.config.layers:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, runtime.left_out(training=training))
    left_out = sorted({tuple(site) for sites in everyone for site in sites})
    if left_out:
        raise ConfigError(complaint(left_out, when))


def complaint(left_out: list[Site], when: str) -> str:
    """Say which TopK sites did not run, and what to do."""
    words = []
    for place in dict.fromkeys(place for place, _ in left_out):
        layers = [str(layer) for where, layer in left_out if where == place]
        noun = "layer" if len(layers) == 1 else "layers"
        words.append(f"the TopK of the {place} at {noun} {', '.join(layers)}")
    return (
        f"{' and '.join(words)} did not run in {when}, so the model is not the one that was asked "
        "for; a flag or --spec of this run leads Megatron past the TopK: drop it, or leave these "
        "layers out of --topk-layers"
    )
