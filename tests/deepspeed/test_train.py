"""Compares examples/deepspeed on two ranks with plain PyTorch: same batches, AdamW and steps."""

import json
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed.conftest import LENGTH, STEPS, flags
from tests.deepspeed.watched_train import EXAMPLE, TOKENS
from tests.harness.launch import Run, kill_job, start
from topk_megatron.errors import REQUEUE

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WATCHED = Path(__file__).with_name("watched_train.py")
# All measured losses were equal to the last bit; other processors may round sums differently.
RELATIVE = 1e-5
# The share of weights that a step may move differently, by over a thousandth of the learning rate.
# Their gradients are smaller than AdamW's eps. We measured at most 2 in 85,000.
DIFFERENTLY = 1e-3


def train(ranks: int, launcher: str, *arguments: str, **environment: str) -> Run:
    """Run the example until it exits."""
    commands = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}"],
        "cluster": [
            "-m",
            "topk_megatron.train.launch",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ],
        "none": [],
    }
    command = [sys.executable, *commands[launcher]]
    if launcher == "deepspeed":
        command.append(f"--master_port={free_port()}")
    variables = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile("w+") as output:
        process = start([*command, str(WATCHED), *arguments], output, variables)
        try:
            code = process.wait(240)
        except BaseException:
            kill_job(process.pid)
            raise
        output.seek(0)
        return Run(code, output.read())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def open_plain(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    offline: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **offline)
    return model, AutoTokenizer.from_pretrained(folder, **offline)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, like the ranks: the number of threads decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_training(example: Any, folder: Path, data: Path) -> tuple[Any, Any, Any]:
    """Return the model, its batches and an AdamW with the example's settings, without DeepSpeed."""
    model, tokenizer = open_plain(folder)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    sequences, _ = example.read_sequences([str(data)], encode, tokenizer.eos_token_id, LENGTH)
    batches = example.Batches(sequences, 8, 0, tokenizer.pad_token_id)
    settings = json.loads((EXAMPLE / "zero1.json").read_text())["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    return model.train(), batches, optimizer


def follow(
    example: Any, folder: Path, data: Path, weights: Path
) -> tuple[list[float], list[float]]:
    """Take the run's steps in plain PyTorch in one process, each from the run's own weights.

    Two correct runs can diverge, because rounding swaps neurons that are almost tied
    (docs/numerics.md). With the run's weights and microbatches, both select the same neurons.

    Args:
        example: The example's module `train`.
        folder: The model before training.
        data: The file that the run trained on.
        weights: The folder with the run's weights after each step.

    Returns:
        The losses, and for each step the share of weights that it moved differently.
    """
    model, batches, optimizer = open_training(example, folder, data)
    losses, moved_differently = [], []
    for step in range(STEPS):
        rate = example.learning_rate(step, STEPS, 1e-3, 2)
        optimizer.param_groups[0]["lr"] = rate
        batch = batches.step(step)
        targets = sum(sequence.num_targets for sequence in batch)
        parts = [example.summed_loss(model, batches, batch[row : row + 2]) for row in (0, 2, 4, 6)]
        for part in parts:
            (part / targets).backward()
        losses.append(sum(part.item() for part in parts) / targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept = torch.load(weights / f"{step + 1}.pt", weights_only=True)
        named = dict(model.named_parameters())
        apart = torch.cat([(kept[name] - p.detach()).flatten() for name, p in named.items()]).abs()
        moved_differently.append((apart > rate / 1000).float().mean().item())
        model.load_state_dict(kept)
    return losses, moved_differently


@pytest.mark.parametrize(
    ("config", "launcher", "kind"),
    [
        ("zero1", "torchrun", "text"),
        ("zero2", "deepspeed", "pairs"),
        ("zero3", "torchrun", "pairs"),
        ("offload", "deepspeed", "text"),
    ],
)
def test_steps_match_plain_pytorch_and_the_folder_holds_the_trained_model(
    config: str,
    launcher: str,
    kind: str,
    example: Any,
    folder: Path,
    data: dict[str, Path],
    tmp_path: Path,
) -> None:
    logits = tmp_path / "logits.pt"
    arguments = flags(folder, data[kind], config, tmp_path / "run")
    run = train(2, launcher, *arguments, TOPK_LOGITS=str(logits), TOPK_WEIGHTS=str(tmp_path))
    assert run.returncode == 0, run.output
    assert "built successfully" not in run.output  # DeepSpeed compiles no operator
    expected, moved_differently = follow(example, folder, data[kind], tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=RELATIVE)
    assert max(moved_differently) < DIFFERENTLY
    opened, _ = open_plain(tmp_path / "run" / "hf")
    with torch.no_grad():
        trained = torch.load(logits, weights_only=True)
        assert torch.equal(opened.eval()(TOKENS).logits, trained)
    kept = torch.load(tmp_path / f"{STEPS}.pt", weights_only=True)
    assert all(torch.equal(kept[name], p) for name, p in opened.named_parameters())
    before = json.loads((folder / "config.json").read_text())
    assert opened.config.topk == before["topk"]
    record = json.loads((tmp_path / "run" / "hf" / "deepspeed_training.json").read_text())
    assert record["ranks"] == 2
    assert record["steps"] == STEPS


def test_losing_a_hundredth_of_one_ranks_gradients_is_caught(
    example: Any, folder: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"TOPK_LOGITS": str(tmp_path / "logits.pt"), "TOPK_WEIGHTS": str(tmp_path)}
    arguments = flags(folder, data["pairs"], "zero2", tmp_path / "run")
    run = train(2, "torchrun", *arguments, **variables, TOPK_LOSE="0.01")
    assert run.returncode == 0, run.output
    _, moved_differently = follow(example, folder, data["pairs"], tmp_path)
    assert max(moved_differently) > 10 * DIFFERENTLY


def test_stopped_run_resumes_from_its_checkpoint_with_the_same_losses(
    example: Any, folder: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    arguments = flags(folder, data["text"], "zero2", tmp_path / "run", "--save-every", "2")
    variables = {"TOPK_LOGITS": str(tmp_path / "logits.pt"), "TOPK_WEIGHTS": str(tmp_path)}
    stopped = train(2, "cluster", *arguments, **variables, TOPK_STOP_AT="1:3")
    assert stopped.returncode == REQUEUE, stopped.output
    assert "stopped by a signal after step 3" in stopped.output
    assert not (tmp_path / "run" / "hf").exists()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [
        "step_0000002",
        "step_0000003",
    ]
    resumed = train(2, "torchrun", *arguments, **variables)
    assert resumed.returncode == 0, resumed.output
    assert "starting after step 3 of 5" in resumed.output
    expected, moved_differently = follow(example, folder, data["text"], tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=RELATIVE)
    assert max(moved_differently) < DIFFERENTLY


def test_in_bfloat16_the_folder_gives_the_trained_models_logits_too(
    folder: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    logits = tmp_path / "logits.pt"
    arguments = flags(folder, data["pairs"], "zero1", tmp_path / "run", "--dtype", "bfloat16")
    run = train(1, "none", *arguments, TOPK_LOGITS=str(logits))
    assert run.returncode == 0, run.output
    opened, _ = open_plain(tmp_path / "run" / "hf", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(opened.eval()(TOKENS).logits, torch.load(logits, weights_only=True))
