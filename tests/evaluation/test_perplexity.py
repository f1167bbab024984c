"""Perplexity against a loop over single tokens, and on models whose loss is known."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topk_megatron.errors import ConfigError, DataError
from topk_megatron.evaluation.perplexity import perplexity, read_documents, windows
from topk_megatron.hf.model import OpenModel, open_model

TEXTS = [
    "def main():\n    return 0\n" * 6,
    "import torch",
    "x",
    "Licensed under the Apache License",
]


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> OpenModel:
    return open_model(folders["default"], dtype="float32", device="cpu")


@given(st.integers(0, 60), st.integers(1, 16), st.data())
def test_every_token_but_the_first_is_scored_once_from_enough_context(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = list(range(length))
    scored = []
    for window in windows(tokens, context, stride):
        assert 2 <= len(window.tokens) <= context + 1
        assert 1 <= window.scored < len(window.tokens)
        for place in range(len(window.tokens) - window.scored, len(window.tokens)):
            token = window.tokens[place]
            assert place >= min(token, context - stride + 1)
            scored.append(token)
    assert scored == tokens[1:]


@pytest.mark.parametrize(("context", "stride"), [(64, None), (16, 16), (16, 5), (7, 1)])
def test_equals_a_loop_over_single_tokens(
    context: int, stride: int | None, opened: OpenModel
) -> None:
    losses = []
    for text in TEXTS:
        tokens = opened.encode(text)
        for place in range(1, len(tokens)):
            # The window that scores a token is the first one that reaches it.
            step = stride or context
            begin = step * max(0, math.ceil((place - context) / step))
            seen = torch.tensor([tokens[begin:place]])
            with torch.no_grad():
                logits = opened.model(seen).logits[0, -1].double()
            losses.append(-float(torch.log_softmax(logits, -1)[tokens[place]]))
    found = perplexity(opened, TEXTS, context=context, stride=stride, batch_size=3)
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
    assert found.low < found.loss < found.high


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(
    folders: dict[str, Path],
) -> None:
    opened = open_model(folders["dense"], dtype="float32", device="cpu")
    with torch.no_grad():
        opened.model.lm_head.weight.zero_()
    found = perplexity(opened, TEXTS)
    assert found.perplexity == pytest.approx(512, rel=1e-5)
    assert found.low == pytest.approx(found.high)


def test_batch_size_changes_nothing(opened: OpenModel) -> None:
    one, many = (perplexity(opened, TEXTS, batch_size=n, context=16) for n in (1, 64))
    assert one.loss == pytest.approx(many.loss, abs=1e-6)
    assert one.tokens == many.tokens


def test_what_cannot_be_measured_is_refused(opened: OpenModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--context must be in \[1, 64\]"):
        perplexity(opened, TEXTS, context=65)
    with pytest.raises(ConfigError, match=r"--stride must be in \[1, context=8\]"):
        perplexity(opened, TEXTS, context=8, stride=9)
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(opened, ["x"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="there is no text in"):
        read_documents([str(tmp_path / "empty.txt")])
