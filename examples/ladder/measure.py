"""Measures a trained run on held-out text, and keeps the result as a file that can be committed.

Losses are kept by document, so that intervals can resample documents, and are measured for the
whole training and for its branches. Token entropies are those of the whole training's model.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from examples.ladder.grid import Run
from examples.ladder.text import REPOSITORY, Data
from examples.ladder.training import seconds_of

RESULTS = REPOSITORY / "examples" / "ladder" / "results"
RECORDED = 262_144  # tokens
LAYERS_OF_DENSE = "all,-2"


def result_of(run: Run, results: Path = RESULTS) -> Path:
    """Return the file of a run's result."""
    return results / f"{run.directory.name}.json"


def measure(run: Run, data: Data, results: Path = RESULTS) -> None:
    """Measure a run unless its result exists, in a process of its own with one thread."""
    target = result_of(run, results)
    if target.exists():
        return
    legs = [
        {"fraction": leg.fraction, "tokens": run.rung.tokens(leg.fraction), "steps": leg.steps}
        | {"seconds": round(seconds_of(leg), 1), "checkpoints": str(leg.checkpoints)}
        for leg in run.legs()
    ]
    about = {
        "name": run.name,
        "depth": run.rung.depth,
        "variant": run.variant,
        "seed": run.seed,
        "flags": run.flags,
        "hidden": int(run.flag("--hidden-size")),
        "parameters": run.rung.parameters,
    }
    task = {"about": about, "legs": legs, "k": run.k, "excerpts": str(data.excerpts)}
    task |= {"folder": str(run.directory), "target": str(target)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "examples.ladder.measure", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    if done.returncode:
        sys.exit(f"error: measuring {run.name} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    """Measure the run that the command line describes."""
    from topk_megatron.files import replacing

    task = json.loads(sys.argv[1])
    legs = [_measure_leg(leg, task) for leg in task["legs"]]
    found = {**task["about"], "k": task["k"], "legs": legs, **_record(task)}
    target = Path(task["target"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_text(_lines(found) + "\n")


def _lines(found: dict[str, Any]) -> str:
    """Return JSON with one line for each entry."""
    entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _measure_leg(leg: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    from topk_megatron.evaluation.perplexity import read_documents, window_losses
    from topk_megatron.hf.export import ExportSettings, export_checkpoint
    from topk_megatron.hf.model import open_model

    folder = Path(task["folder"]) / f"hf-{leg['fraction']:g}"
    shutil.rmtree(folder, ignore_errors=True)
    export_checkpoint(Path(leg.pop("checkpoints")), folder, ExportSettings())
    opened = open_model(folder, dtype="float32", device="cpu")
    losses, counts = [], []
    for text in read_documents([task["excerpts"]]):
        some, scored = window_losses(opened, [text])
        losses.append(round(sum(some), 3))
        counts.append(sum(scored))
    return {**leg, "loss": sum(losses) / sum(counts), "losses": losses, "counts": counts}


def _record(task: dict[str, Any]) -> dict[str, Any]:
    """Record the whole training's model.

    Returns:
        The entropy of the recorded tokens in bits, and by layer: the share of neurons that never
        fired, and of all others how often they fired and their token entropy in bits.
    """
    from topk_megatron.analysis.corpus import open_corpus
    from topk_megatron.analysis.measures import corrected_entropy
    from topk_megatron.analysis.record.plan import RecordConfig
    from topk_megatron.analysis.record.run import record
    from topk_megatron.analysis.sources import make_source
    from topk_megatron.hf.model import open_model

    folder = open_model(Path(task["folder"]) / "hf-1")
    corpus = open_corpus(task["excerpts"], lambda: folder.tokenizer, max_tokens=RECORDED)
    chosen: dict[str, Any] = {}
    if not folder.topk_layers:
        chosen = {"layers": LAYERS_OF_DENSE, "k": task["k"]}
    study = Path(task["folder"]) / "study"
    config = RecordConfig(study=study, run="last", overwrite=True)
    done = record(make_source(folder, **chosen), corpus, config)
    counts = np.unique(corpus.tokens, return_counts=True)[1]
    found: dict[str, Any] = {}
    for layer in done.layers:
        histogram = done.histogram(layer)
        entropy = corrected_entropy(histogram.counts, histogram.neurons, histogram.width)
        found[str(layer)] = by_neuron(histogram.totals, entropy)
    every = entropy_of(counts)
    return {"tokens": len(corpus.tokens), "entropy_of_tokens": every, "neurons": found}


def entropy_of(counts: np.ndarray) -> float:
    """Return the entropy, in bits, of tokens that occur this often; all do."""
    from topk_megatron.analysis.measures import corrected_entropy

    return round(float(corrected_entropy(counts, np.zeros_like(counts), 1)[0]), 3)


def by_neuron(totals: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
    """Return what a result keeps of one layer.

    Args:
        totals: How often each neuron fired, int64 [h].
        entropy: The token entropy of each neuron, in bits, float64 [h].
    """
    fired = totals > 0
    return {
        "silent": float(1 - fired.mean()),
        "activations": totals[fired].tolist(),
        "token_entropy": entropy[fired].round(3).tolist(),
    }


if __name__ == "__main__":
    main()
