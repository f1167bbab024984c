"""SAEs on disk, as SAELens saves them, one directory a layer and seed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topk_megatron.errors import CheckpointError

_NAME = re.compile(r"layer-(\d+)-seed-(\d+)")


def sae_directory(study: Path, layer: int, seed: int) -> Path:
    """Where the SAE of a layer and seed lies in a study."""
    return study / "sae" / f"layer-{layer:03d}-seed-{seed}"


def load_saes(directories: Sequence[Path]) -> tuple[dict[int, Any], dict[str, Any]]:
    """Load SAEs of several layers, all of one seed.

    Returns:
        SAEs by layer, and what a manifest says of them.

    Raises:
        CheckpointError: SAELens is not installed, or a directory is no SAE, names no layer, or
            repeats one.
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise CheckpointError("SAEs need the package sae-lens, which is not installed") from error
    saes: dict[int, Any] = {}
    seeds: set[int] = set()
    for directory in directories:
        match = _NAME.fullmatch(directory.name)
        if match is None:
            raise CheckpointError(
                f"{directory} does not say which layer it is for; SAE directories are called "
                "layer-LLL-seed-S"
            )
        if int(match[1]) in saes:
            raise CheckpointError(f"two SAEs for layer {int(match[1])} were given; give one")
        try:
            saes[int(match[1])] = SAE.load_from_disk(str(directory), device="cpu").eval()
        except Exception as error:  # SAELens raises errors of many kinds
            raise CheckpointError(f"cannot load the SAE in {directory}: {error!r}") from error
        seeds.add(int(match[2]))
    if len(seeds) > 1:
        raise CheckpointError(f"the SAEs are of seeds {sorted(seeds)}; give those of one seed")
    return saes, {"path": str(directories[0].parent), "layers": sorted(saes), "seed": seeds.pop()}
