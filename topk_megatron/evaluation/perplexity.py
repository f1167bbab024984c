"""Perplexity on held-out text.

In every document the model reads windows of `context` tokens, each `stride` tokens after the one
before, and predicts the next token at each position. A window scores only the tokens that no
earlier window has scored. Every token of a document except the first is therefore predicted exactly
once, from at most `context` preceding tokens and, after the first window, from at least
context - stride + 1. Training sees stride = context; a smaller stride gives a lower loss and takes
longer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from topk_megatron.errors import ConfigError, DataError
from topk_megatron.hf.model import OpenModel
from topk_megatron.text.reading import read_texts

_RESAMPLES = 1000


@dataclass(frozen=True)
class Window:
    """A stretch of one document.

    Attributes:
        tokens: the tokens that the model reads, and one more to predict.
        scored: how many of the last tokens this window scores.
    """

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """The measured perplexity.

    Attributes:
        loss: nats per token.
        low: lower end of the 95 % interval of the loss, from resampling windows.
        high: upper end of that interval.
        perplexity: e to the power of the loss.
        bits_per_byte: loss per byte of UTF-8 text, comparable between tokenizers.
        tokens: number of predicted tokens.
        documents: number of documents read.
    """

    loss: float
    low: float
    high: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    documents: int


def windows(tokens: list[int], context: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows, as the module's docstring says."""
    scored_to = 1  # the first token has nothing before it
    for begin in range(0, max(len(tokens) - 1, 0), stride):
        end = min(begin + context + 1, len(tokens))
        yield Window(tokens[begin:end], end - scored_to)
        scored_to = end
        if end == len(tokens):
            return


def read_documents(patterns: list[str], json_key: str = "text") -> list[str]:
    """Read the texts of files and globs (.txt, .md, .jsonl, compressed or not).

    Raises:
        DataError: nothing matches, a line is bad, or there is no text.
    """
    texts = [text for text in read_texts(patterns, json_key) if text.strip()]
    if not texts:
        raise DataError(f"there is no text in {', '.join(patterns)}")
    return texts


def perplexity(opened: OpenModel, texts: list[str], **options: Any) -> Perplexity:
    """Measure the perplexity of a model on texts.

    Args:
        opened: model and tokenizer.
        texts: documents.
        options: keyword arguments of `window_losses`.

    Raises:
        ConfigError: as `window_losses`.
        DataError: as `window_losses`.
    """
    losses, counts = window_losses(opened, texts, **options)
    total = sum(losses) / sum(counts)
    low, high = _interval(losses, counts)
    num_bytes = sum(len(text.encode()) for text in texts)
    return Perplexity(
        loss=total,
        low=low,
        high=high,
        perplexity=math.exp(total),
        bits_per_byte=sum(losses) / math.log(2) / num_bytes,
        tokens=sum(counts),
        documents=len(texts),
    )


def window_losses(
    opened: OpenModel,
    texts: list[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Any = None,
) -> tuple[list[float], list[int]]:
    """Measure the loss of every window, by which models are compared on the same text.

    Args:
        opened: model and tokenizer.
        texts: documents.
        context: tokens per window; None is the length that the model was trained with.
        stride: tokens between the starts of windows; None is the context.
        batch_size: windows per forward pass.
        progress: a wrapper for the list of batches, such as tqdm.

    Returns:
        The sum of losses (nats) and the number of scored tokens of each window, in text order.

    Raises:
        ConfigError: context or stride is out of range.
        DataError: no document has two tokens.
    """
    context, stride = _check(opened, context, stride)
    encoded = [opened.encode(text) for text in texts]
    cut = [window for tokens in encoded for window in windows(tokens, context, stride)]
    if not cut:
        raise DataError("no document has two tokens or more: there is nothing to predict")
    return _score(opened, cut, batch_size, progress)


def _check(opened: OpenModel, context: int | None, stride: int | None) -> tuple[int, int]:
    context = opened.max_length if context is None else context
    if not 1 <= context <= opened.max_length:
        raise ConfigError(
            f"--context must be in [1, {opened.max_length}] for {opened.name}, got {context}"
        )
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride must be in [1, context={context}], got {stride}")
    return context, stride


def _score(
    opened: OpenModel, cut: list[Window], batch_size: int, progress: Any
) -> tuple[list[float], list[int]]:
    """Return the sum of losses (nats) and the number of scored tokens of each window."""
    # A batch holds windows of one length, so that nothing is padded.
    order = sorted(range(len(cut)), key=lambda n: -len(cut[n].tokens))
    batches: list[list[int]] = []
    for number in order:
        same = batches and len(cut[batches[-1][0]].tokens) == len(cut[number].tokens)
        if not same or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(number)
    losses = [0.0] * len(cut)
    for batch in progress(batches) if progress else batches:
        for number, loss in zip(batch, _losses(opened, [cut[n] for n in batch]), strict=True):
            losses[number] = loss
    return losses, [window.scored for window in cut]


def _losses(opened: OpenModel, batch: list[Window]) -> list[float]:
    import torch

    tokens = torch.tensor([window.tokens for window in batch], device=opened.model.device)
    with torch.inference_mode():
        logits = opened.model(tokens[:, :-1], use_cache=False).logits.float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
    # In float32 the sum over a window would lose digits.
    return [
        float(row[-window.scored :].double().sum()) for row, window in zip(each, batch, strict=True)
    ]


def _interval(losses: list[float], counts: list[int]) -> tuple[float, float]:
    import numpy as np

    generator = np.random.default_rng(0)
    drawn = generator.integers(len(losses), size=(_RESAMPLES, len(losses)))
    means = np.asarray(losses)[drawn].sum(1) / np.asarray(counts)[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
