"""`record`: run a model over a corpus and keep what its neurons did.

The corpus is cut into blocks. A block's part of every aggregate, and its activations if they are
wanted, are written when the block is done; `merge` adds the parts up. Memory holds one block. After
a kill, blocks that are on disk are not computed again. Ranks take blocks in turn.

Legend: T tokens of a block, K survivors per token.
"""

import datetime
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from topk_megatron.analysis.corpus import Corpus, check_tokenizer
from topk_megatron.analysis.record import parts
from topk_megatron.analysis.record.block import BlockText, Sizes, aggregates
from topk_megatron.analysis.record.merge import merge_layer, merge_run
from topk_megatron.analysis.record.plan import RecordConfig, make_plan
from topk_megatron.analysis.sources import ActivationSource
from topk_megatron.analysis.study import Run, open_run, read_json, run_directory
from topk_megatron.errors import AnalysisError
from topk_megatron.files import file_facts, remove_partial, write_json


@dataclass(frozen=True)
class Ranks:
    """This process among those that run the same command together.

    Attributes:
        rank: the number of this process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def largest(self, seconds: float) -> float:
        """Return the largest number of all ranks."""
        if self.world == 1:
            return seconds
        numbers: list[float | None] = [None] * self.world
        dist.all_gather_object(numbers, seconds)
        return max(number for number in numbers if number is not None)


def join_ranks() -> Ranks:
    """Join the ranks that torchrun started; a process on its own is rank 0 of 1."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        # A rank may finish its blocks hours before another.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return Ranks(dist.get_rank(), world)


def record(
    source: ActivationSource,
    corpus: Corpus,
    config: RecordConfig,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Record `source` on `corpus`, or resume what an earlier call started.

    Args:
        source: the model.
        corpus: the text.
        config: what to keep.
        ranks: the ranks that share the work; None is this process alone.
        progress: called with the blocks that this rank has done, and those that it has in all.

    Returns:
        The finished run: a `Result` whose tables are in the study already.

    Raises:
        DataError: the corpus does not fit the model.
        AnalysisError: a run of this name has other settings, or the model computes NaN.
    """
    ranks = ranks or Ranks()
    check_tokenizer(corpus, source.folder.path, source.folder.vocab_size)
    recorder = _Recorder(source, corpus, config)
    if not recorder.begin(ranks):
        return open_run(config.study, config.run)
    started = time.perf_counter()
    mine = range(ranks.rank, recorder.plan["blocks"], ranks.world)
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


class _Recorder:
    def __init__(self, source: ActivationSource, corpus: Corpus, config: RecordConfig) -> None:
        self.source, self.corpus, self.config = source, corpus, config
        self.directory = run_directory(config.study, config.run)
        self.plan = make_plan(source, corpus, config)
        self.seq_length: int = self.plan["corpus"]["seq_length"]
        self.sizes = Sizes(
            source.width,
            source.folder.vocab_size,
            config.top_n,
            config.before,
            config.after,
            source.mode,
        )

    def begin(self, ranks: Ranks) -> bool:
        """Prepare the directory; return False if this very run is finished already."""
        manifest, plan = self.directory / "manifest.json", self.directory / "parts" / "plan.json"
        ranks.barrier()
        if self.config.overwrite:
            if ranks.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
            ranks.barrier()
        if manifest.exists():
            before = read_json(manifest)
            before.pop("files", None)
            _check_same(before, self.plan)
            return False
        if plan.exists():
            _check_same(read_json(plan), self.plan)
        elif ranks.rank == 0:
            write_json(plan, self.plan)
        if ranks.rank == 0:
            remove_partial(self.directory)
        ranks.barrier()
        return True

    def block(self, number: int) -> int:
        """Record one block unless it is on disk; return how many tokens the model read."""
        part = parts.part_path(self.directory, number)
        if parts.is_whole(part):
            return 0
        first = number * self.plan["block_tokens"]
        last = min(first + self.plan["block_tokens"], len(self.corpus.tokens))
        tokens = self.corpus.sequences(first, last, self.seq_length)
        documents = self.corpus.documents_of(np.arange(first, last))
        text = BlockText(tokens, documents, first, self.seq_length)
        states = self._states(tokens)
        found = {
            layer: aggregates(neurons, values, text, self.sizes)
            for layer, (values, neurons) in states.items()
        }
        if self.config.raw:
            parts.write_activations(self.directory, number, self.config.run, text, states)
        parts.write(part, found)  # last: it says that the block is done
        return last - first

    def _states(self, tokens: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return the values float32 and the neurons, both [T, K], of every layer."""
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
            step = self.plan["batch_size"] * length
            end = min(begin + step, whole) if begin < whole else len(tokens)
            batch = torch.from_numpy(tokens[begin:end].reshape(-1, min(length, end - begin)))
            for layer, pair in source.states(batch.to(source.folder.device)).items():
                for target, tensor in zip(found[layer], pair, strict=True):
                    target[begin:end] = tensor.cpu().numpy()
            begin = end
        for layer, (values, _) in found.items():
            if np.isnan(values).any():
                raise AnalysisError(
                    f"layer {layer} of {source.folder.path} computes NaN on this text; the model "
                    "is broken, so record another checkpoint"
                )
        return found

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


def _check_same(before: dict[str, Any], plan: dict[str, Any]) -> None:
    """Refuse to continue or keep a run that has another plan.

    Paths may differ: model and text are compared by their fingerprints.

    Raises:
        AnalysisError: the plans differ.
    """
    one, other = _without_paths(before), _without_paths(plan)
    different = [name for name in other if one.get(name) != other[name]]
    if different:
        raise AnalysisError(
            f"the run {plan['run']} was started with another {', '.join(different)}; choose "
            "another --name, or give --overwrite to replace it"
        )


def _without_paths(plan: dict[str, Any]) -> dict[str, Any]:
    named = {name: dict(plan.get(name) or {}) for name in ("model", "corpus")}
    for entry in named.values():
        entry.pop("path", None)
    return {**plan, **named}
