"""Reading tokens: Megatron's datasets as Megatron reads them, text by the model's tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from tests.analysis.conftest import write_corpus
from topk_megatron.analysis.corpus import check_tokenizer, open_corpus
from topk_megatron.errors import DataError
from topk_megatron.hf.model import open_model


def no_tokenizer() -> None:
    raise AssertionError("a dataset needs no tokenizer")


def test_a_dataset_is_read_as_megatron_reads_it(dataset: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(str(dataset))
    corpus = open_corpus(str(dataset), no_tokenizer)
    assert len(corpus.starts) - 1 == len(theirs)
    for number, (begin, end) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:], strict=True)):
        assert np.array_equal(corpus.tokens[begin:end], theirs[number])


def test_text_files_give_the_tokenizers_ids_with_an_end(topk_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word5 word9 nonsense")
    (tmp_path / "b.jsonl").write_text('{"text": "word7"}\n{"text": "word8 word8"}\n')
    folder = open_model(topk_folder)
    corpus = open_corpus(str(tmp_path), lambda: folder.tokenizer)
    assert sorted(np.split(corpus.tokens, corpus.starts[1:-1]), key=len)[0].tolist() == [7, 1]
    alone = open_corpus(str(tmp_path / "a.txt"), lambda: folder.tokenizer)
    assert alone.tokens.tolist() == [5, 9, 0, 1]


def test_documents_and_tokens_can_be_chosen(tmp_path: Path) -> None:
    documents = [np.arange(2, 2 + n) for n in (3, 4, 5)]
    prefix = str(write_corpus(tmp_path / "text", documents))
    last = open_corpus(prefix, no_tokenizer, documents="-2:")
    assert last.tokens.tolist() == [*documents[1], *documents[2]]
    assert last.starts.tolist() == [0, 4, 9]
    cut = open_corpus(prefix, no_tokenizer, documents="1:", max_tokens=6)
    assert cut.starts.tolist() == [0, 4, 6]
    assert cut.documents_of(np.arange(6)).tolist() == [0, 0, 0, 0, 1, 1]


def test_equal_text_has_an_equal_fingerprint_however_it_is_stored(tmp_path: Path) -> None:
    documents = [np.arange(2, 40), np.arange(5, 9)]
    one = open_corpus(str(write_corpus(tmp_path / "a", documents)), no_tokenizer)
    two = open_corpus(str(write_corpus(tmp_path / "b", [*documents, documents[0]])), no_tokenizer)
    assert one.fingerprint() != two.fingerprint()
    two = open_corpus(str(tmp_path / "b"), no_tokenizer, documents=":2")
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: Path(f"{p}.idx").write_bytes(b"nothing"), "is not a Megatron dataset index"),
        (lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:60]), "shorter"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"12"), "shorter than"),
        (lambda p: Path(f"{p}.bin").unlink(), "is missing"),
        (lambda p: write_corpus(p, []), "is empty"),
        (lambda p: write_corpus(p, [np.arange(3)], code=6), "integers"),
        (lambda p: Path(f"{p}.manifest.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_and_empty_datasets_are_refused(damage, reason: str, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "text", [np.arange(2, 50)])
    damage(prefix)
    with pytest.raises(DataError, match=reason):
        open_corpus(str(prefix), no_tokenizer)


def test_a_tokenizer_that_does_not_fit_is_refused(topk_folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(write_corpus(tmp_path / "t", [np.array([5, 96])])), no_tokenizer)
    with pytest.raises(DataError, match="holds token 96, but the model"):
        check_tokenizer(corpus, topk_folder, 96)
    check_tokenizer(corpus, topk_folder, 97)


def test_another_tokenizers_dataset_is_refused_by_its_fingerprint(
    dataset: Path, tokenizer: Path, tmp_path: Path
) -> None:
    corpus = open_corpus(str(dataset), no_tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    check_tokenizer(corpus, tmp_path, 512)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(DataError, match="made with another tokenizer"):
        check_tokenizer(corpus, tmp_path, 512)
