"""Exports have Megatron's logits, all layouts export the same files, and the way back is exact."""

import filecmp
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.conftest import TOPK
from tests.harness.launch import REPOSITORY, pretrain
from topk_megatron.checkpoint.reader import CheckpointReader
from topk_megatron.hf.export import ExportSettings, export_checkpoint, export_trajectory
from topk_megatron.hf.restore import RestoreSettings, restore_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The two add float32 numbers in a different order; logits are 1 to 4 in size.
TOLERANCE = 1e-5
_SHAPE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64"
_LLAMA = "--normalization RMSNorm --swiglu --disable-bias-linear"
ARCHITECTURES = {
    "default, tied": _LLAMA,
    "untied, grouped queries, QK norm, padding, abs, annealing": f"{_LLAMA} "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2 "
    "--qk-layernorm --make-vocab-size-divisible-by 100 --topk-mode abs "
    "--topk-anneal exponential --topk-anneal-end 10",
    "GELU, LayerNorm, biases, QK norm": "--qk-layernorm",
    "squared ReLU, part of RoPE scaled as llama3, QKV bias": "--squared-relu --add-qkv-bias "
    "--disable-bias-linear --normalization RMSNorm --rotary-percent 0.5 --use-rope-scaling "
    "--rotary-base 500000 --kv-channels 32 --ffn-hidden-size 200",
    "experts after a dense layer, sigmoid, bias, shared": f"{_LLAMA} --num-experts 4 "
    "--moe-router-topk 2 --moe-layer-freq [0]+[1]*3 --moe-ffn-hidden-size 96 "
    "--moe-shared-expert-intermediate-size 48 --moe-router-score-function sigmoid "
    "--moe-router-topk-scaling-factor 1.5 --moe-router-enable-expert-bias",
    "experts everywhere, softmax before, RoPE interleaved and interpolated": f"{_LLAMA} "
    "--num-experts 4 --moe-router-topk 2 --moe-router-pre-softmax --rotary-interleaved "
    "--rotary-seq-len-interpolation-factor 2",
}
_HF_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).float().eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])[0]).logits, sys.argv[3])
"""


def run(command: list[Any], **environment: str) -> None:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),  # the script imports the harness
            **environment,
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def megatron_logits(file: Path, tokenizer: Path, *flags: str | Path) -> tuple[Tensor, Tensor]:
    """Return tokens [b, s] and Megatron's logits [b, s, vocabulary]."""
    base = f"{_SHAPE} --max-position-embeddings 64 --position-embedding-type rope"
    training = "--micro-batch-size 2 --mock-data --train-iters 1 --lr 1e-3 --eval-iters 0"
    script = Path(__file__).with_name("reference_logits.py")
    text = [*base.split(), *training.split(), "--save-interval", "1", *flags]
    tokens = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
    run([sys.executable, script, *text, *tokens], TOPK_LOGITS=str(file))
    return torch.load(file)


def hugging_face_logits(folder: Path, megatron: Path) -> Tensor:
    """Compute logits of the tokens in a `megatron_logits` file, in a process without CPU layer."""
    output = megatron.with_suffix(".hf")
    run([sys.executable, "-c", _HF_LOGITS, folder, megatron, output])
    return torch.load(output)


@dataclass(frozen=True)
class Reference:
    """A checkpoint, Megatron's logits and the exported folder."""

    checkpoint: Path
    logits: Path
    folder: Path


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def reference(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    work = tmp_path_factory.mktemp("reference")
    made = Reference(work / "megatron", work / "logits", work / "hf")
    megatron_logits(
        made.logits, tokenizer, *request.param.split(), *TOPK, "--save", work / "megatron"
    )
    export_checkpoint(made.checkpoint, made.folder, ExportSettings())
    return made


def test_exported_model_has_megatrons_logits(reference: Reference) -> None:
    _, expected = torch.load(reference.logits)
    got = hugging_face_logits(reference.folder, reference.logits)
    assert got.shape == expected.shape
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def weights(directory: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint except the optimizer's."""
    reader = CheckpointReader(directory)
    return {k: reader.read(k) for k in reader.tensors if not k.startswith("optimizer")}


def test_way_back_is_bitwise_with_the_same_keys(reference: Reference, tmp_path: Path) -> None:
    restore_checkpoint(reference.folder, tmp_path / "back", RestoreSettings())
    name = "iter_0000004"
    before, after = weights(reference.checkpoint / name), weights(tmp_path / "back" / name)
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert tensor.equal(after[key]), key
    first, second = (CheckpointReader(p / name) for p in (reference.checkpoint, tmp_path / "back"))
    extra = [{k for k in reader.others if "_extra_state" in k} for reader in (first, second)]
    assert extra[0] == extra[1]
    export_checkpoint(tmp_path / "back", tmp_path / "hf", ExportSettings())
    same = filecmp.cmp(tmp_path / "hf/model.safetensors", reference.folder / "model.safetensors")
    assert same


# With these flags every layout saves the weights of one checkpoint: learning rate 0 changes none.
STILL = "--finetune --train-iters 1 --lr 0 --min-lr 0 --lr-warmup-iters 0 --save-interval 1"
LAYOUTS = {
    "one rank": (1, ""),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2 x PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "VPP": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}


@pytest.fixture(scope="module")
def layouts(
    flags: list[str], initial: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of the same weights, one written by each layout."""
    saved = {}
    for name, (ranks, layout) in LAYOUTS.items():
        directory = tmp_path_factory.mktemp("layout")
        settings = [*flags, *TOPK, *STILL.split(), *layout.split(), "--load", str(initial)]
        job = pretrain(ranks, *settings, "--save", directory)
        assert job.returncode == 0, job.output
        saved[name] = directory
    return saved


def test_all_layouts_export_identical_files(layouts: dict[str, Path], tmp_path: Path) -> None:
    folders = {}
    for name, checkpoint in layouts.items():
        folders[name] = tmp_path / name.replace(" ", "")
        export_checkpoint(checkpoint, folders[name], ExportSettings())
    first = folders.pop("one rank")
    names = sorted(path.name for path in first.iterdir())
    assert {"config.json", "model.safetensors", "topk_training.json"} <= set(names)
    for name, folder in folders.items():
        assert sorted(path.name for path in folder.iterdir()) == names, name
        for file in names:
            assert (folder / file).read_bytes() == (first / file).read_bytes(), (name, file)


def test_training_resumes_from_the_returned_checkpoint_in_another_layout(
    flags: list[str], initial: Path, tmp_path: Path
) -> None:
    export_checkpoint(initial, tmp_path / "hf", ExportSettings())
    restore_checkpoint(tmp_path / "hf", tmp_path / "back", RestoreSettings(tp=2))
    resume = ["--no-load-optim", "--no-load-rng", "--train-iters", "4"]
    losses = []
    for name, layout in (("first", initial), ("second", tmp_path / "back")):
        settings = [*flags, *TOPK, *resume, "--load", str(layout)]
        ranks, parallel = (1, []) if name == "first" else (2, LAYOUTS["TP2"][1].split())
        job = pretrain(ranks, *settings, *parallel, tensorboard=tmp_path / name)
        assert job.returncode == 0, job.output
        losses.append(job.losses())
    assert sorted(losses[0]) == [2, 3, 4]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


def test_trajectory_lists_every_iteration_and_stores_equal_files_once(
    flags: list[str], tmp_path: Path
) -> None:
    anneal = ["--topk-anneal", "linear", "--topk-anneal-end", "3"]
    save = ["--save", str(tmp_path / "run"), "--save-interval", "2", "--train-iters", "4"]
    job = pretrain(1, *flags, *TOPK, *anneal, *save)
    assert job.returncode == 0, job.output
    export_trajectory(tmp_path / "run", tmp_path / "hf", ExportSettings())
    manifest = json.loads((tmp_path / "hf" / "trajectory.json").read_text())
    assert manifest == {
        "format_version": 1,
        "revisions": [
            # The k of the last step: 64 - (64 - 8) / 3, then the final 8.
            {"name": "iter_0000002", "iteration": 2, "tokens_seen": 2 * 8 * 64, "k": 45},
            {"name": "iter_0000004", "iteration": 4, "tokens_seen": 4 * 8 * 64, "k": 8},
        ],
    }
    first, second = (tmp_path / "hf" / f"iter_{n:07d}" for n in (2, 4))
    assert (first / "tokenizer.model").samefile(second / "tokenizer.model")
    assert not (first / "model.safetensors").samefile(second / "model.safetensors")
    assert json.loads((second / "config.json").read_text())["topk"]["k"] == 8


FAMILIES = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}
_MAKE_DENSE = """
import sys, json, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
family, folder, tokenizer, changes = sys.argv[1:]
size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, vocab_size=512, rms_norm_eps=1e-5)
torch.manual_seed(0)
config = AutoConfig.for_model(family, **{**size, **json.loads(changes)})
model = AutoModelForCausalLM.from_config(config)
for parameter in model.parameters():
    parameter.data.add_(0.1 * torch.randn_like(parameter))
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
"""


@pytest.fixture(params=FAMILIES)
def dense(request: pytest.FixtureRequest, layout_folder: Path, tmp_path: Path) -> Path:
    """A dense model saved by transformers, with the suite's tokenizer."""
    changes = json.dumps(FAMILIES[request.param])
    folder = tmp_path / "dense"
    run([sys.executable, "-c", _MAKE_DENSE, request.param, folder, layout_folder, changes])
    return folder


@pytest.fixture(scope="module")
def layout_folder(initial: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder; other models borrow its tokenizer."""
    folder = tmp_path_factory.mktemp("borrowed") / "hf"
    export_checkpoint(initial, folder, ExportSettings())
    return folder


def test_dense_model_keeps_its_logits_at_full_k_and_continues_as_a_topk_model(
    dense: Path, flags: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "megatron"
    restore_checkpoint(dense, checkpoint, RestoreSettings())
    start = ["--load", str(checkpoint), "--finetune", "--topk-layers", "0-2"]
    model = ["--use-checkpoint-args", "--topk-k", "64", *_LLAMA.split()]
    if CheckpointReader(checkpoint / "iter_0000000").args.qk_layernorm:
        model.append("--qk-layernorm")  # Megatron does not read it from the checkpoint
    _, logits = megatron_logits(tmp_path / "logits", tokenizer, *start, *model)
    expected = hugging_face_logits(dense, tmp_path / "logits")
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)

    if json.loads((dense / "config.json").read_text())["model_type"] != "llama":
        return  # one family's training is enough
    annealed = ["--topk-k", "8", "--topk-anneal", "exponential", "--topk-anneal-end", "4"]
    job = pretrain(
        1, *flags, *start, *annealed, "--untie-embeddings-and-output-weights",
        "--train-iters", "6", tensorboard=tmp_path / "events",
    )  # fmt: skip
    assert job.returncode == 0, job.output
    assert list(job.scalars("topk/k").values()) == [64, 38, 23, 13, 8, 8]
    assert sorted(job.losses()) == [1, 2, 3, 4, 5, 6]
