"""The plan of a recording: everything that decides its bytes.

The plan is kept in ``parts/plan.json`` while a run is under way and becomes its manifest, so that a
run is resumed or kept only under equal settings, with an equal model and on equal text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topk_megatron.analysis.corpus import Corpus
from topk_megatron.analysis.sources import ActivationSource
from topk_megatron.analysis.study import FORMAT_VERSION
from topk_megatron.errors import AnalysisError

# Tokens of a forward pass: enough to keep a CPU's matrix products busy.
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What to keep, and where.

    Attributes:
        study: the study directory.
        run: name of the run in it.
        seq_length: tokens per sequence; None takes the model's number of positions.
        batch_size: sequences per forward pass; None takes about 4096 tokens.
        block_tokens: tokens per block, cut down to whole sequences.
        top_n: examples kept per neuron.
        before: tokens of an example's window before the neuron fired.
        after: tokens of the window after it fired.
        raw: also keep every single activation.
        bootstrap_neurons: neurons per layer whose histograms are kept by block.
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
    raw: bool = False
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


def make_plan(source: ActivationSource, corpus: Corpus, config: RecordConfig) -> dict[str, Any]:
    """Return the manifest without its files.

    Raises:
        AnalysisError: the sequences are longer than the model allows.
    """
    seq_length = config.seq_length or source.folder.max_length
    if seq_length > source.folder.max_length:
        raise AnalysisError(
            f"--seq-length {seq_length} is more than the {source.folder.max_length} "
            f"positions of the model in {source.folder.path}"
        )
    block_tokens = max(1, config.block_tokens // seq_length) * seq_length
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
            "seq_length": seq_length,
            "fingerprint": corpus.fingerprint(),
        },
        "top_n": config.top_n,
        "context_before": config.before,
        "context_after": config.after,
        "block_tokens": block_tokens,
        "blocks": -(-len(corpus.tokens) // block_tokens),
        "batch_size": config.batch_size or max(1, _BATCH_TOKENS // seq_length),
        "bootstrap_neurons": config.bootstrap_neurons,
        "raw": config.raw,
    }
