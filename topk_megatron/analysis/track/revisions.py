"""The exported checkpoints of one training run, and the recording of all on the same text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topk_megatron.analysis.corpus import open_corpus
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import Ranks, record
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.study import Run
from topk_megatron.errors import AnalysisError, CheckpointError
from topk_megatron.files import read_object
from topk_megatron.hf.model import open_model


@dataclass(frozen=True)
class Revision:
    """One checkpoint of a trajectory.

    Attributes:
        name: its name in the trajectory, such as ``iter_0000100``.
        folder: its Hugging Face folder.
        iteration: its training iteration.
        tokens_seen: tokens of training before it; None if unknown.
        k: survivors per token at that iteration; None if unknown.
    """

    name: str
    folder: Path
    iteration: int
    tokens_seen: int | None
    k: int | None


@dataclass(frozen=True, kw_only=True)
class Text:
    """The corpus to record on.

    Attributes:
        path: see `open_corpus`.
        documents: see `open_corpus`.
        max_tokens: see `open_corpus`.
    """

    path: str
    documents: str | None = None
    max_tokens: int | None = None


def read_trajectory(directory: Path) -> list[Revision]:
    """Read the revisions of a folder that ``convert_checkpoint.py to-hf --all-iterations`` wrote.

    Returns:
        The revisions in the order of training.

    Raises:
        CheckpointError: the folder holds no trajectory, or one that is damaged.
        AnalysisError: the trajectory has fewer than two checkpoints.
    """
    path = directory / "trajectory.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no trajectory.json; export one with --all-iterations"
        )
    content = read_object(path)
    try:
        revisions = [
            Revision(
                entry["name"],
                directory / entry["name"],
                int(entry["iteration"]),
                entry.get("tokens_seen"),
                entry.get("k"),
            )
            for entry in content["revisions"]
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
    """Record every checkpoint as ``RUN@NAME``, except those that are recorded already.

    Args:
        revisions: the checkpoints in the order of training.
        text: the corpus.
        config: how to record; its `run` is the part of the name before the @.
        ranks: the ranks that share the work.
        source: options of `make_source`.

    Raises:
        AnalysisError: the checkpoints differ in their TopK layers.
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
