"""What is wrong with a checkpoint that looks complete.

Two looks of different price. The directory of a torch_dist checkpoint says which bytes of which
file each tensor is in, so that a file that is missing or cut short is found from sizes alone. Bits
that changed inside a file are found only by its hash, which ``--verify-integrity`` writes on saving
and reads on loading.
"""

from pathlib import Path
from typing import Any


def find_damage(directory: Path, *, hashes: bool = False) -> str | None:
    """Describe the first damage found, or None.

    Args:
        directory: a complete torch_dist checkpoint.
        hashes: also read every byte and compare it with the recorded SHA-256, if there is one.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        storage: Any = FileSystemReader(str(directory)).read_metadata().storage_data
    except Exception as error:  # whatever unpickling garbage raises
        return f".metadata cannot be read ({type(error).__name__})"
    needed: dict[str, int] = {}
    for piece in storage.values():
        end = piece.offset + piece.length
        needed[piece.relative_path] = max(needed.get(piece.relative_path, 0), end)
    for name, size in sorted(needed.items()):
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return _find_changed_file(directory) if hashes else None


def _find_changed_file(directory: Path) -> str | None:
    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if not (directory / validation.INTEGRITY_FNAME).exists():
        return None
    try:
        validation._verify_integrity_manifest_impl(str(directory))
    except CheckpointingException as error:
        return " ".join(str(error).splitlines()[-1].split())
    return None
