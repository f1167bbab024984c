"""Tiny exported folders and corpora that the analysis tests share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

VOCAB = 96
HIDDEN = 32
K = 4


def make_tokenizer(directory: Path, words: list[str]) -> None:
    """A word-level tokenizer whose ids are the places in `words`, saved as Hugging Face does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(directory)


def make_model(directory: Path, *, layers: tuple[int, ...], seed: int, iteration: int = 0) -> Path:
    """A random model of 3 layers with a TopK at `layers`, saved as an export is."""
    from topk_megatron.hf.modeling.modeling_topk import TopKLMConfig, TopKLMForCausalLM

    torch.manual_seed(seed)
    config = TopKLMConfig(
        topk={
            "site": "residual",
            "k": K,
            "layers": list(layers),
            "mode": "value",
            "mlp_k": None,
            "mlp_groups": None,
        },
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_theta=10000.0,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    TopKLMForCausalLM(config).save_pretrained(directory)
    make_tokenizer(directory, ["<unk>", "</s>", *(f"word{n}" for n in range(2, VOCAB))])
    training = {"format_version": 1, "iteration": iteration, "tokens_seen": 1000 * iteration}
    (directory / "topk_training.json").write_text(json.dumps(training))
    return directory


def write_corpus(prefix: Path, documents: list[np.ndarray], code: int = 8) -> Path:
    """A Megatron dataset of uint16 tokens (type code 8), a sequence a document."""
    lengths = np.array([len(document) for document in documents], "<i4")
    tokens = np.concatenate(documents).astype("<u2") if documents else np.zeros(0, "<u2")
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = 2 * np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[: len(lengths)]
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + np.uint64(1).tobytes()
        + np.uint8(code).tobytes()
        + np.uint64(len(documents)).tobytes()
        + np.uint64(len(documents) + 1).tobytes()
        + lengths.tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )
    return prefix


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread, as the ranks of torchrun do: other numbers sum in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def topk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK LM: H = 32, k = 4 at layers 0 and 1 of 3."""
    return make_model(tmp_path_factory.mktemp("topk"), layers=(0, 1), seed=0, iteration=200)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of the same sizes."""
    return make_model(tmp_path_factory.mktemp("dense"), layers=(), seed=1, iteration=200)


@pytest.fixture(scope="session")
def token_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset: 12 documents of skewed random tokens, 1,277 in all."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(40, 170, size=12)
    weights = 1 / np.arange(1, VOCAB - 1)
    documents = [
        np.append(rng.choice(np.arange(2, VOCAB), n, p=weights / weights.sum()), 1) for n in lengths
    ]
    return write_corpus(tmp_path_factory.mktemp("tokens") / "text", documents)
