"""Trains and records the SAEs of both seeds, except those that are there already.

Training takes long, so it writes its own tables and SAEs when it is done, as recordings do; a
command that was interrupted afterwards does not train again.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pyarrow as pa

from topk_megatron.analysis.corpus import Corpus, check_tokenizer, open_corpus
from topk_megatron.analysis.record.plan import RecordConfig
from topk_megatron.analysis.record.run import record
from topk_megatron.analysis.result import write_tables
from topk_megatron.analysis.sae.training import (
    SAETraining,
    hidden_states,
    load_saes,
    quality,
    sae_directory,
    train_sae,
)
from topk_megatron.analysis.sources import choose_layers, make_source
from topk_megatron.analysis.study import Run, read_json
from topk_megatron.errors import AnalysisError
from topk_megatron.files import write_json
from topk_megatron.hf.model import OpenModel, open_model

# Held-out hidden states on which the quality of an SAE is measured, at most.
_QUALITY_TOKENS = 16384
_TRAINING = pa.schema(
    [
        ("layer", pa.int16()),
        ("seed", pa.int32()),
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("mse", pa.float64()),
        ("explained_variance", pa.float64()),
        ("dead", pa.int32()),
    ]
)
_QUALITY = pa.schema(
    [
        ("layer", pa.int16()),
        ("seed", pa.int32()),
        *(
            (name, pa.float64())
            for name in ("explained_variance", "l0", "dead_share", "loss", "loss_without")
        ),
    ]
)


def baseline(
    args: Namespace, config: RecordConfig
) -> tuple[tuple[Run, Run], dict[int, tuple[Any, Any]], dict[str, Any]]:
    """Train and record the SAEs of both seeds.

    Returns:
        Both runs, both decoders [N, H] by layer, and entries for parameters.json.

    Raises:
        AnalysisError: the model has TopK layers, k is too large, or the corpus too short.
    """
    folder = open_model(args.model)
    if folder.topk_layers:
        raise AnalysisError(
            f"{args.model} has TopK layers: its neurons need no SAE; give the dense twin"
        )
    layers = choose_layers(folder, args.layers)
    training = SAETraining(
        width=args.width or folder.hidden_size, k=args.k, tokens=args.train_tokens, lr=args.lr
    )
    if training.k > training.width:
        raise AnalysisError(f"--k must be at most the width {training.width}, got {training.k}")
    corpus = _corpus(args, folder, args.documents)
    train = _corpus(args, folder, args.train_documents) if args.train_documents else corpus
    facts = _facts(args, folder, layers, training, train)
    _train_all(args, folder, layers, training, train, corpus, facts)
    runs, decoders = [], []
    for seed in args.seeds:
        places = [sae_directory(args.study, layer, seed) for layer in layers]
        source = make_source(folder, sae=places)
        runs.append(record(source, corpus, replace(config, run=f"{args.name}-seed-{seed}")))
        saes, _ = load_saes(places)
        decoders.append({n: sae.W_dec.detach().float().cpu().numpy() for n, sae in saes.items()})
    pairs = {layer: (decoders[0][layer], decoders[1][layer]) for layer in layers}
    return (runs[0], runs[1]), pairs, facts


def _facts(
    args: Namespace,
    folder: OpenModel,
    layers: tuple[int, ...],
    training: SAETraining,
    train: Corpus,
) -> dict[str, Any]:
    """Return what decides the trained SAEs, and where the model is."""
    return {
        "model": str(args.model),
        "layers": list(layers),
        "k": training.k,
        "width": training.width,
        "seeds": args.seeds,
        "train_tokens": training.tokens,
        "stored_tokens": args.stored_tokens,
        "lr": training.lr,
        "model_fingerprint": folder.fingerprint(),
        "train_fingerprint": train.fingerprint(),
    }


def _corpus(args: Namespace, folder: OpenModel, documents: str | None) -> Corpus:
    corpus = open_corpus(
        args.corpus, lambda: folder.tokenizer, documents=documents, max_tokens=args.max_tokens
    )
    check_tokenizer(corpus, folder.path, folder.vocab_size)
    return corpus


def _train_all(
    args: Namespace,
    folder: OpenModel,
    layers: tuple[int, ...],
    training: SAETraining,
    train: Corpus,
    held_out: Corpus,
    facts: dict[str, Any],
) -> None:
    """Train all SAEs, unless they are there already and were trained in the same way."""
    directory = args.study / "sae"
    done = directory / "trained.json"
    if done.exists() and read_json(done) == facts and not args.overwrite:
        return
    length = args.seq_length or folder.max_length
    if min(len(train.tokens), len(held_out.tokens)) < length:
        raise AnalysisError(f"the corpus is shorter than one sequence of {length} tokens")
    states = hidden_states(folder, train, layers, args.stored_tokens, length)
    fresh = hidden_states(
        folder, held_out, layers, min(args.stored_tokens, _QUALITY_TOKENS), length
    )
    rows, qualities = [], []
    for layer in layers:
        for seed in args.seeds:
            sae, logged = train_sae(states[layer], training, seed)
            where = {"layer": layer, "seed": seed}
            rows += [{**where, **entry} for entry in logged]
            found = quality(folder, sae, layer, fresh[layer], held_out, length)
            qualities.append({**where, **found})
            sae.to("cpu").save_inference_model(str(sae_directory(args.study, layer, seed)))
    tables = {
        "training": pa.Table.from_pylist(rows, _TRAINING),
        "quality": pa.Table.from_pylist(qualities, _QUALITY),
    }
    write_tables(directory, tables)
    write_json(done, facts)
