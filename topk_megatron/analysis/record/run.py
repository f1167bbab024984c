"""`record`: run a model over a corpus and keep what its neurons did.

The corpus is cut into blocks. A block's activations and its part of every aggregate are written
when the block is done and read again in `merge`; memory holds one block. After a kill the blocks
that are on disk are not done again. Ranks take blocks in turn.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from topk_megatron.analysis import tables
from topk_megatron.analysis.corpus import Corpus, check_tokenizer
from topk_megatron.analysis.record import parts
from topk_megatron.analysis.record.block import BlockText, Sizes, histogram, moments, top_examples
from topk_megatron.analysis.record.merge import merge_layer, merge_run
from topk_megatron.analysis.record.ranks import Ranks
from topk_megatron.analysis.sources import ActivationSource
from topk_megatron.analysis.study import (
    FORMAT_VERSION,
    Run,
    open_run,
    read_json,
    run_directory,
    write_json,
)
from topk_megatron.errors import AnalysisError
from topk_megatron.files import file_facts, remove_partial

# Tokens of a forward pass: enough to keep a CPU's matrix products busy.
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What to keep, and where.

    Attributes:
        study: the study directory.
        run: name of the run in it.
        seq_length: tokens of a sequence; None takes the model's number of positions.
        batch_size: sequences of a forward pass; None takes about 4096 tokens.
        block_tokens: tokens of a block, cut down to whole sequences.
        top_n: examples kept of every neuron.
        before: tokens of an example's window before the neuron fired.
        after: tokens of it afterwards.
        raw: also write every activation.
        bootstrap_neurons: neurons of each layer whose histograms are kept by block.
        overwrite: replace a run of this name.
    """

    study: Path
    run: str
    seq_length: int | None = None
    batch_size: int | None = None
    block_tokens: int = 16384
    top_n: int = 20
    before: int = 16
    after: int = 8
    raw: bool = True
    bootstrap_neurons: int = 32
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_length", "batch_size", "block_tokens", "top_n"):
            number = getattr(self, name)
            if number is not None and number < 1:
                flag = name.replace("_", "-")
                raise AnalysisError(f"--{flag} must be at least 1, got {number}")
        for name in ("before", "after"):
            if getattr(self, name) < 0:
                raise AnalysisError(
                    f"--context-{name} must be at least 0, got {getattr(self, name)}"
                )


def record(
    source: ActivationSource,
    corpus: Corpus,
    config: RecordConfig,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Record `source` on `corpus`; resumes what an earlier call began.

    Args:
        source: the model.
        corpus: the text.
        config: what to keep.
        ranks: the ranks that share the work; None is this process alone.
        progress: called with tokens done and tokens in all, of this rank.

    Returns:
        The finished run.

    Raises:
        DataError: a corpus that does not fit the model.
        AnalysisError: a run of this name that was made otherwise, or states that hold NaN.
    """
    ranks = ranks or Ranks()
    check_tokenizer(corpus, source.folder.path, source.folder.vocab_size)
    recorder = _Recorder(source, corpus, config)
    if not recorder.begin(ranks):
        return open_run(config.study, config.run)
    started = time.perf_counter()
    mine = range(ranks.rank, recorder.num_blocks, ranks.world)
    recorded = 0
    for place, block in enumerate(mine, start=1):
        recorded += recorder.block(block)
        progress(place, len(mine))
    seconds = ranks.largest(time.perf_counter() - started)
    ranks.barrier()
    for place, layer in enumerate(source.layers):
        if place % ranks.world == ranks.rank:
            merge_layer(recorder.directory, recorder.plan, layer, recorder.sizes)
    ranks.barrier()
    if ranks.rank == 0:
        merge_run(recorder.directory, recorder.plan, source.folder.tokenizer, corpus)
        recorder.finish(seconds, recorded, ranks)
    ranks.barrier()
    return open_run(config.study, config.run)


def _without_paths(plan: dict[str, Any]) -> dict[str, Any]:
    named = {name: dict(plan.get(name) or {}) for name in ("model", "corpus")}
    for entry in named.values():
        entry.pop("path", None)
    return {**plan, **named}


def _prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


class _Recorder:
    def __init__(self, source: ActivationSource, corpus: Corpus, config: RecordConfig) -> None:
        self.source, self.corpus, self.config = source, corpus, config
        self.directory = run_directory(config.study, config.run)
        self.seq_length = config.seq_length or source.folder.max_length
        if self.seq_length > source.folder.max_length:
            raise AnalysisError(
                f"--seq-length {self.seq_length} is more than the {source.folder.max_length} "
                f"positions of the model in {source.folder.path}"
            )
        self.batch = config.batch_size or max(1, _BATCH_TOKENS // self.seq_length)
        self.block_tokens = max(1, config.block_tokens // self.seq_length) * self.seq_length
        self.num_blocks = -(-len(corpus.tokens) // self.block_tokens)
        self.sizes = Sizes(
            source.width,
            source.folder.vocab_size,
            config.top_n,
            config.before,
            config.after,
            source.mode,
        )
        self.plan = self._plan()

    def _plan(self) -> dict[str, Any]:
        """The manifest without its files: all that decides what is written."""
        source, corpus, config = self.source, self.corpus, self.config
        return {
            "format_version": FORMAT_VERSION,
            "run": config.run,
            "kind": source.kind,
            "model": source.folder.describe(),
            "sae": source.sae,
            "layers": list(source.layers),
            "width": source.width,
            "k": source.k,
            "mode": source.mode,
            "corpus": {
                "path": corpus.path,
                "kind": corpus.kind,
                "tokens": len(corpus.tokens),
                "documents": len(corpus.starts) - 1,
                "seq_length": self.seq_length,
                "fingerprint": corpus.fingerprint(),
            },
            "top_n": config.top_n,
            "context_before": config.before,
            "context_after": config.after,
            "block_tokens": self.block_tokens,
            "blocks": self.num_blocks,
            "batch_size": self.batch,
            "bootstrap_neurons": config.bootstrap_neurons,
            "raw": config.raw,
        }

    def begin(self, ranks: Ranks) -> bool:
        """Make the directory ready; False if the very same run is there already."""
        manifest, plan = self.directory / "manifest.json", self.directory / "parts" / "plan.json"
        ranks.barrier()
        if self.config.overwrite:
            if ranks.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
            ranks.barrier()
        if manifest.exists():
            before = read_json(manifest)
            before.pop("files", None)
            self._check_same(before)
            return False
        if plan.exists():
            self._check_same(read_json(plan))
        elif ranks.rank == 0:
            write_json(plan, self.plan)
        if ranks.rank == 0:
            remove_partial(self.directory)
        ranks.barrier()
        return True

    def _check_same(self, before: dict[str, Any]) -> None:
        # Where model and text lie does not matter: their fingerprints are compared.
        one, other = (_without_paths(plan) for plan in (before, self.plan))
        different = [name for name in other if one.get(name) != other[name]]
        if different:
            raise AnalysisError(
                f"the run {self.config.run} was begun with another {', '.join(different)}; choose "
                "another --name, or give --overwrite to replace it"
            )

    def block(self, number: int) -> int:
        """Record one block unless it is on disk; returns the tokens that were read."""
        part = parts.part_path(self.directory, number)
        if parts.is_whole(part):
            return 0
        first = number * self.block_tokens
        last = min(first + self.block_tokens, len(self.corpus.tokens))
        tokens = self.corpus.sequences(first, last, self.seq_length)
        documents = self.corpus.documents_of(np.arange(first, last))
        text = BlockText(tokens, documents, first, self.seq_length)
        states = self._states(tokens)
        if self.config.raw:
            self._write_raw(number, text, states)
        arrays: dict[str, np.ndarray] = {}
        for layer, (values, neurons) in states.items():
            found = {
                **histogram(neurons, values, tokens, self.sizes),
                **_prefixed("moments", moments(neurons, values, self.sizes.width)),
                **_prefixed("top", top_examples(neurons, values, text, self.sizes)),
            }
            arrays |= _prefixed(str(layer), found)
        parts.write(part, arrays)
        return last - first

    def _states(self, tokens: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Values float32 and neurons [T, K] of every layer."""
        source, length = self.source, self.seq_length
        k = min(source.k, source.width)
        kind = np.uint8 if source.width <= 1 << 8 else np.int32
        found = {
            layer: (np.empty((len(tokens), k), np.float32), np.empty((len(tokens), k), kind))
            for layer in source.layers
        }
        whole = len(tokens) // length * length
        begin = 0
        while begin < len(tokens):
            end = min(begin + self.batch * length, whole) if begin < whole else len(tokens)
            batch = torch.from_numpy(tokens[begin:end].reshape(-1, min(length, end - begin)))
            for layer, pair in source.states(batch.to(source.folder.device)).items():
                for target, tensor in zip(found[layer], pair, strict=True):
                    target[begin:end] = tensor.cpu().numpy()
            begin = end
        for layer, (values, _) in found.items():
            if np.isnan(values).any():
                raise AnalysisError(
                    f"layer {layer} of {source.folder.path} gives NaN on this text; the model is "
                    "broken"
                )
        return found

    def _write_raw(self, number: int, text: BlockText, states: dict[int, Any]) -> None:
        positions = text.first + np.arange(len(text.tokens))
        tables.write_table(
            self.directory / "tokens" / f"block-{number:06d}.parquet",
            pa.table(
                [positions, text.documents, text.tokens.astype(np.int32)], schema=tables.TOKENS
            ),
        )
        parts.write_activations(
            self.directory / "activations" / f"block-{number:06d}.parquet",
            self.config.run,
            positions,
            text.documents,
            states,
        )

    def finish(self, seconds: float, recorded: int, ranks: Ranks) -> None:
        """Write speed.json and, last, the manifest; remove the parts."""
        files = {
            str(path.relative_to(self.directory)): file_facts(path)
            for path in sorted(self.directory.rglob("*.parquet"))
        }
        total = len(self.corpus.tokens)
        raw = sum(f["bytes"] for n, f in files.items() if n.startswith(("activations", "tokens")))
        all_ranks = ranks.world * recorded
        write_json(
            self.directory / "speed.json",
            {
                "tokens_per_second": min(total, all_ranks) / seconds if recorded else None,
                "seconds": seconds,
                "tokens": min(total, all_ranks),
                "ranks": ranks.world,
                "threads": torch.get_num_threads(),
                "device": str(self.source.folder.device),
                "raw_bytes_per_token": raw / total if self.config.raw else None,
                "aggregate_bytes": sum(f["bytes"] for f in files.values()) - raw,
            },
        )
        write_json(self.directory / "manifest.json", {**self.plan, "files": files})
        shutil.rmtree(self.directory / "parts")
