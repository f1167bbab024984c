"""Training through Megatron with our core attention and with Megatron's own."""

from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import TOPK
from tests.harness.launch import Run, pretrain

pytestmark = [pytest.mark.distributed]

OWN = ["--attention-backend", "unfused"]
DECODE = Path(__file__).with_name("decode_with_cache.py")
AS_ON_A_GPU = Path(__file__).with_name("as_on_a_gpu.py")


def train(directory: Path, *flags: str | Path, ranks: int = 1, entry: Path | None = None) -> Run:
    run = pretrain(ranks, *flags, tensorboard=directory, entry=entry)
    assert run.returncode == 0, run.output
    return run


def test_twenty_steps_differ_from_megatrons_attention_by_rounding_alone(
    flags: list[str], initial: Path, single_rank: Run, tmp_path: Path
) -> None:
    own = train(tmp_path, *flags, *TOPK, *OWN, "--load", initial, "--finetune")
    assert "attention: torch's fused kernels" in single_rank.output
    assert "attention: Megatron's own (--attention-backend unfused)" in own.output
    losses, wanted = single_rank.losses(), own.losses()
    assert len(losses) == 20
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses != wanted  # or the flag chose nothing


SHARED = ["--group-query-attention", "--num-query-groups", "2"]
MORE = {
    "shared heads": SHARED,
    "dropout": ["--attention-dropout", "0.2"],
    "window": ["--window-size", "8,0"],
    "mask per document": ["--reset-attention-mask", "--reset-position-ids"],
    "scaled by layer": ["--apply-query-key-layer-scaling"],
}


@pytest.mark.parametrize("name", MORE)
def test_settings_of_attention_mean_what_they_mean_to_megatron(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    few = [*flags, *TOPK, *MORE[name], "--train-iters", "6"]
    own = train(tmp_path / "own", *few, *OWN).losses()
    assert train(tmp_path / "ours", *few).losses() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("more", [[], [*SHARED, "--attention-dropout", "0.2"]])
def test_recomputed_attention_is_bitwise_the_same(
    more: list[str], flags: list[str], tmp_path: Path
) -> None:
    few = [*flags, *TOPK, *more, "--train-iters", "6"]
    kept = train(tmp_path / "kept", *few).losses()
    again = train(tmp_path / "again", *few, "--recompute-granularity", "selective").losses()
    assert again == kept


def test_packed_documents_are_attended_to_alone(flags: list[str], tmp_path: Path) -> None:
    """The boundaries of packed sequences give the losses of a mask per document."""
    few = [*flags, *TOPK, "--train-iters", "6", "--micro-batch-size", "1"]
    masked = train(tmp_path / "mask", *few, *MORE["mask per document"]).losses()
    packed = train(tmp_path / "packed", *few, "--dataloader-inter-document-masking").losses()
    assert packed == pytest.approx(masked, rel=1e-5)


@pytest.mark.parametrize("more", [[], SHARED, OWN], ids=["causal", "shared heads", "own"])
def test_a_key_value_cache_gives_the_logits_of_whole_sequences(
    more: list[str], flags: list[str], tmp_path: Path
) -> None:
    place = {"TOPK_LOGITS": str(tmp_path / "logits.pt")}
    run = pretrain(1, *flags, *TOPK, *more, entry=DECODE, environment=place)
    assert run.returncode == 0, run.output
    whole, cached = torch.load(tmp_path / "logits.pt")
    # Megatron returns the logits of the prompt's last token, and then one row a token.
    last = torch.cat([part[:, -1:] for part in cached], dim=1)
    torch.testing.assert_close(last, whole[:, -last.shape[1] :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [[], OWN, ["--normalization", "LayerNorm"]])
def test_bfloat16_on_a_gpu_without_transformer_engine_needs_no_module_that_is_not_installed(
    more: list[str], flags: list[str], tmp_path: Path
) -> None:
    few = [*flags, *TOPK, "--train-iters", "2", "--bf16", *more]
    run = train(tmp_path, *few, entry=AS_ON_A_GPU)
    assert max(run.losses()) == 2
    assert "layers: Megatron's own (Transformer Engine is not installed)" in run.output
    assert "masked softmax (needs scaled_masked_softmax_cuda of NVIDIA Apex)" in run.output
