"""Every checkpoint of a run as a Hugging Face folder, to follow neurons over training."""

import filecmp
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from topk_megatron.checkpoint.directory import is_complete, iterations
from topk_megatron.errors import CheckpointError
from topk_megatron.files import new_folder, refuse_existing
from topk_megatron.hf.export import (
    FORMAT_VERSION,
    ExportSettings,
    Progress,
    settings_vocab,
    write_folder,
)
from topk_megatron.hf.megatron_source import MegatronSource

MANIFEST = "trajectory.json"


def export_trajectory(
    load: Path,
    save: Path,
    settings: ExportSettings,
    *,
    progress: Callable[[int], Progress] | None = None,
) -> list[dict[str, Any]]:
    """Export every complete iteration of `load` into the new folder `save`.

    A file that equals its predecessor's is a hard link to it, where the file system has them.

    Returns:
        The revisions as in trajectory.json, ascending: name, iteration, tokens_seen, k.

    Raises:
        CheckpointError, DataError: one of them cannot be exported; nothing is left at `save`.
    """
    refuse_existing(save)
    complete = {n: path for n, path in sorted(iterations(load).items()) if is_complete(path)}
    if not complete:
        raise CheckpointError(f"{load} holds no complete torch_dist checkpoint")
    vocab_size = settings_vocab(settings)
    revisions: list[dict[str, Any]] = []
    with new_folder(save) as folder:
        previous: Path | None = None
        for number, directory in complete.items():
            source = MegatronSource(directory, dense=settings.dense, vocab_size=vocab_size)
            revision = folder / f"iter_{number:07d}"
            revision.mkdir()
            write_folder(source, revision, settings, progress)
            if previous is not None:
                _link_equal_files(previous, revision)
            previous = revision
            revisions.append(
                {
                    "name": revision.name,
                    "iteration": number,
                    "tokens_seen": source.tokens_seen,
                    "k": source.config["topk"]["k"],
                }
            )
        manifest = {"format_version": FORMAT_VERSION, "revisions": revisions}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return revisions


def _link_equal_files(previous: Path, revision: Path) -> None:
    for path in sorted(revision.iterdir()):
        before = previous / path.name
        if before.is_file() and filecmp.cmp(before, path, shallow=False):
            link = path.with_name(f"{path.name}.link")
            with suppress(OSError):  # a file system without hard links keeps the copy
                os.link(before, link)
                link.replace(path)
