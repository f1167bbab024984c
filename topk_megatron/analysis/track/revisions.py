"""The exported checkpoints of one training run, and recording all of them on the same text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topk_megatron.analysis.corpus import open_corpus
from topk_megatron.analysis.record.ranks import Ranks
from topk_megatron.analysis.record.run import RecordConfig, record
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.study import Run
from topk_megatron.errors import AnalysisError, CheckpointError
from topk_megatron.hf.model import open_model


@dataclass(frozen=True)
class Revision:
    """One checkpoint of a trajectory."""

    name: str
    folder: Path
    iteration: int
    tokens_seen: int | None
    k: int | None


@dataclass(frozen=True, kw_only=True)
class Text:
    """The corpus to record on; see `open_corpus`."""

    path: str
    documents: str | None = None
    max_tokens: int | None = None


def read_trajectory(directory: Path) -> list[Revision]:
    """The revisions of a folder that ``convert_checkpoint.py to-hf --all-iterations`` wrote.

    Raises:
        CheckpointError: no trajectory, or one that is damaged.
        AnalysisError: fewer than two checkpoints.
    """
    path = directory / "trajectory.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no trajectory.json; export one with --all-iterations"
        )
    try:
        entries = json.loads(path.read_text())["revisions"]
        revisions = [
            Revision(
                entry["name"],
                directory / entry["name"],
                int(entry["iteration"]),
                entry.get("tokens_seen"),
                entry.get("k"),
            )
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if len(revisions) < 2:
        raise AnalysisError(f"{path} lists {len(revisions)} checkpoints; tracking needs two")
    return sorted(revisions, key=lambda revision: revision.iteration)


def record_trajectory(
    revisions: list[Revision],
    text: Text,
    config: RecordConfig,
    ranks: Ranks,
    *,
    source: dict[str, Any],
) -> list[Run]:
    """Record every checkpoint as ``RUN@NAME``; those that are recorded already are kept.

    Args:
        revisions: in the order of training.
        text: the corpus.
        config: of the recordings; its `run` is the name before the @.
        ranks: who shares the work.
        source: options of `make_source`.
    """
    runs = []
    for revision in revisions:
        folder = open_model(revision.folder)
        corpus = open_corpus(
            text.path,
            lambda folder=folder: folder.tokenizer,
            documents=text.documents,
            max_tokens=text.max_tokens,
        )
        named = replace(config, run=f"{config.run}@{revision.name}")
        runs.append(record(make_source(folder, **source), corpus, named, ranks))
    if len({(run.layers, run.width) for run in runs}) != 1:
        raise AnalysisError("the checkpoints differ in their TopK layers; give --layers")
    return runs
