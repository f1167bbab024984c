"""A wrong command ends with one clear line, before any training and without our traceback."""

import json
from pathlib import Path

import pytest

from tests.harness.launch import REPOSITORY, SCRIPT, Run, pretrain

pytestmark = [pytest.mark.distributed]

CASES = {
    "k-of-zero": ("--topk-k 0", "topk_k must be in [1, hidden_size=64], got 0; raise --topk-k"),
    "k-over-hidden-size": (
        "--topk-k 65",
        "topk_k must be in [1, hidden_size=64], got 65; lower --topk-k",
    ),
    "layer-out-of-range": (
        "--topk-layers 0-4",
        "layer 4 is out of range; this model's layers are 0 to 3",
    ),
    "layer-twice": ("--topk-layers 1,2,1", "layer 1 is listed twice; list each layer once"),
    "anneal-ends-before-it-begins": (
        "--topk-anneal linear --topk-anneal-begin 9 --topk-anneal-end 5",
        "must end after it begins: --topk-anneal-begin is 9, --topk-anneal-end is 5",
    ),
    "anneal-flags-without-anneal": ("--topk-anneal-end 5", "--topk-anneal is constant"),
    "missing-data": ("--data-path /no/such/prefix", "dataset file /no/such/prefix.bin does not"),
    "missing-tokenizer": ("--tokenizer-model /no/such.model", "/no/such.model does not exist"),
    "world-size": (
        "--tensor-model-parallel-size 2",
        "1 ranks cannot be divided by --tensor-model-parallel-size 2 = 2",
    ),
    "part-without-documents": ("--split 9999,1,0", "leaves the validation part"),
    "split-of-words": ("--split most,some", "--split takes numbers such as 90,8,2"),
    "gpu-only-on-cpu": (
        "--transformer-impl transformer_engine",
        "needs a CUDA device and this machine has none",
    ),
    "misspelt-flag": ("--topk-layer 1", "unrecognized arguments: --topk-layer 1; --help lists"),
    "k-of-words": ("--topk-k many", "argument --topk-k: invalid int value: 'many'"),
    "empty-layers": ("--topk-layers=", "--topk-layers takes numbers and ranges"),
    "finetune-from-nowhere": (
        "--load /no/such/place --finetune",
        "--finetune needs a checkpoint, but /no/such/place holds no complete one",
    ),
    "other-checkpoint-format": (
        "--ckpt-format torch --save /tmp/never-made",
        "--ckpt-format torch does not store the TopK settings",
    ),
    "log-interval-of-zero": ("--log-interval 0", "--log-interval must be at least 1"),
    "megatrons-own-checks": (
        "--hidden-size 66 --num-attention-heads 4 --topk-k 4",
        "Megatron refuses these arguments",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_command_is_one_clear_line(name: str, flags: list[str]) -> None:
    change, complaint = CASES[name]
    settings = [*flags, *change.split()]
    if name == "empty-layers":
        settings = [*flags, "--topk-layers", ""]
    check_refusal(pretrain(1, *settings), complaint)


def check_refusal(run: Run, complaint: str) -> None:
    assert run.returncode != 0
    assert complaint in run.error_line()
    # torchrun reports the failed rank itself; the rank must not print a traceback.
    assert "[rank0]" not in run.output
    assert f"{REPOSITORY}/topk_megatron/train" not in run.output
    assert "before the start of training step" not in run.output


def test_under_torchrun_too(flags: list[str]) -> None:
    change, complaint = CASES["layer-out-of-range"]
    run = pretrain(2, *flags, *change.split(), entry=SCRIPT)
    assert run.returncode != 0
    assert complaint in run.error_line()
    assert "[rank0]" not in run.output


def test_broken_index_is_named(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(b"\0" * 64)
    (tmp_path / "text.idx").write_bytes(b"not an index")
    run = pretrain(1, *flags, "--data-path", tmp_path / "text")
    assert f"{tmp_path}/text.idx is not a Megatron dataset index" in run.error_line()


def test_data_of_another_tokenizer_is_refused(
    flags: list[str], dataset: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").symlink_to(f"{dataset}{suffix}")
    manifest = json.loads(Path(f"{dataset}.manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (tmp_path / "text.manifest.json").write_text(json.dumps(manifest))
    run = pretrain(1, *flags, "--data-path", tmp_path / "text")
    assert "was tokenized with another tokenizer" in run.error_line()
