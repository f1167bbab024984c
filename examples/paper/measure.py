"""Measures trained models: perplexity, tasks, and what their neurons do on held-out text."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grid import Run, hash_of

K_OF_DENSE = (8, 16, 32, 64)  # a dense model is recorded at every k that a TopK model has
LAYERS_OF_DENSE = "all,-2"
MIN_COUNT = 50  # with fewer activations, a neuron's entropy says little
HELD_OUT = "-4:"  # the last four plays, which training never sees


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Attributes:
        documents: Held-out plays on which perplexity is measured.
        examples: Examples of each task.
        tokens: Tokens recorded.
    """

    documents: int
    examples: int
    tokens: int


FULL = Amounts(documents=2, examples=200, tokens=65536)
FAST = Amounts(documents=1, examples=20, tokens=8192)


def measure_all(
    runs: Sequence[Run],
    texts: Sequence[Path],
    tasks: Sequence[Path],
    dataset: Path,
    study: Path,
    amounts: Amounts,
    jobs: int,
) -> dict[str, dict[str, Any]]:
    """Measure the runs that lack these measures; return all measures by the run's name."""
    how = _how(texts, tasks, amounts)
    missing = [run for run in runs if _read(run, how) is None]
    shared = (list(texts)[-amounts.documents :], list(tasks), dataset, study, amounts, how)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for name in pool.map(_measure, missing, *([one] * len(missing) for one in shared)):
            print(f"measured {name}", flush=True)
    found = {run.name: _read(run, how) for run in runs}
    return {name: measures for name, measures in found.items() if measures is not None}


def recordings(run: Run) -> dict[int, str]:
    """Return the names of a run's recordings by k."""
    if run.variant == "dense":
        return {k: f"{run.directory.name}-k{k}" for k in K_OF_DENSE}
    return {run.k: run.directory.name}


def folder_of(run: Run) -> Path:
    """Return the run's Hugging Face folder."""
    return run.directory / "hf"


def _how(texts: Sequence[Path], tasks: Sequence[Path], amounts: Amounts) -> dict[str, Any]:
    """Return all that decides a measure except the model; a change makes stored measures stale."""
    files = (*list(texts)[-amounts.documents :], *tasks, Path(__file__))
    return {**asdict(amounts), "sha256": hash_of(files)}


def _read(run: Run, how: dict[str, Any]) -> dict[str, Any] | None:
    path = run.directory / "measures.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("how") == how else None


def _measure(
    run: Run,
    texts: list[Path],
    tasks: list[Path],
    dataset: Path,
    study: Path,
    amounts: Amounts,
    how: dict[str, Any],
) -> str:
    import torch

    torch.set_num_threads(1)
    from topk_megatron.evaluation.perplexity import read_documents, window_losses
    from topk_megatron.evaluation.tasks import evaluate_tasks
    from topk_megatron.files import read_scalars, replacing
    from topk_megatron.hf.export import ExportSettings, export_checkpoint
    from topk_megatron.hf.model import open_model

    shutil.rmtree(folder_of(run), ignore_errors=True)
    export_checkpoint(run.directory / "checkpoints", folder_of(run), ExportSettings())
    opened = open_model(folder_of(run), dtype="float32", device="cpu")
    losses, counts = window_losses(opened, read_documents([str(path) for path in texts]))
    scores = evaluate_tasks(opened, [str(path) for path in tasks], limit=amounts.examples)
    events = run.directory / "tensorboard"
    found = {
        "how": how,
        "losses": losses,
        "counts": counts,
        "tasks": scores,
        "training_loss": list(read_scalars(events, "lm loss").items()),
        "neurons": _record(run, dataset, study, amounts),
    }
    with replacing(run.directory / "measures.json") as temporary:
        temporary.write_text(json.dumps(found))
    return run.name


def _record(run: Run, dataset: Path, study: Path, amounts: Amounts) -> dict[str, dict[str, Any]]:
    """Record the run; return silent share and token entropies by "k/layer"."""
    from topk_megatron.analysis.corpus import open_corpus
    from topk_megatron.analysis.measures import corrected_entropy
    from topk_megatron.analysis.record.plan import RecordConfig
    from topk_megatron.analysis.record.run import record
    from topk_megatron.analysis.sources import make_source
    from topk_megatron.hf.model import open_model

    folder = open_model(folder_of(run))
    corpus = open_corpus(
        str(dataset), lambda: folder.tokenizer, documents=HELD_OUT, max_tokens=amounts.tokens
    )
    is_dense = not folder.topk_layers  # as is a model whose only TopK is inside the MLP
    found: dict[str, dict[str, Any]] = {}
    for k, name in recordings(run).items():
        chosen: dict[str, Any] = {"layers": LAYERS_OF_DENSE, "k": k} if is_dense else {}
        config = RecordConfig(study=study, run=name, overwrite=True)
        done = record(make_source(folder, **chosen), corpus, config)
        for layer in done.layers:
            histogram = done.histogram(layer)
            entropy = corrected_entropy(histogram.counts, histogram.neurons, histogram.width)
            found[f"{k}/{layer}"] = {
                "silent": float((histogram.totals == 0).mean()),
                "token_entropy": entropy[histogram.totals >= MIN_COUNT].round(4).tolist(),
            }
    return found
