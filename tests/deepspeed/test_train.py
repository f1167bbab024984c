"""examples/deepspeed on two ranks against plain PyTorch: same batches, same AdamW, same losses."""

import json
import socket
import sys
import tempfile
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
# float32 sums of another order; measured below 1e-6 over these steps.
RELATIVE = 1e-5


def train(ranks: int, launcher: str, *arguments: str, **environment: str) -> Run:
    """Run the example to its end."""
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


@pytest.fixture(scope="module")
def plain(example: Any, folder: Path, data: dict[str, Path]) -> dict[str, tuple[list[float], Any]]:
    """Losses and the trained model of plain PyTorch on one process, for both kinds of data."""
    found = {}
    for kind, path in data.items():
        model, tokenizer = open_plain(folder)

        def encode(text: str, tokenizer: Any = tokenizer) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        end = tokenizer.eos_token_id
        sequences, _ = example.read_sequences([str(path)], encode, end, LENGTH)
        batches = example.Batches(sequences, 8, 0, tokenizer.pad_token_id)
        settings = json.loads((EXAMPLE / "zero1.json").read_text())["optimizer"]["params"]
        optimizer = torch.optim.AdamW(
            model.parameters(),
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            fused=True,
        )
        losses = []
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = example.learning_rate(step, STEPS, 1e-3, 2)
            batch = batches.step(step)
            mean = example.summed_loss(model.train(), batches, batch)
            mean = mean / sum(sequence.num_targets for sequence in batch)
            mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean.item())
        found[kind] = (losses, model.eval())
    return found


@pytest.mark.parametrize(
    ("config", "launcher", "kind"),
    [
        ("zero1", "torchrun", "text"),
        ("zero2", "deepspeed", "pairs"),
        ("zero3", "torchrun", "text"),
        ("offload", "deepspeed", "pairs"),
    ],
)
def test_losses_are_plain_pytorchs_and_the_folder_holds_the_trained_model(
    config: str,
    launcher: str,
    kind: str,
    plain: dict[str, tuple[list[float], Any]],
    folder: Path,
    data: dict[str, Path],
    tmp_path: Path,
) -> None:
    logits = tmp_path / "logits.pt"
    arguments = flags(folder, data[kind], config, tmp_path / "run")
    run = train(2, launcher, *arguments, TOPK_LOGITS=str(logits))
    assert run.returncode == 0, run.output
    expected, reference = plain[kind]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=RELATIVE)
    trained = torch.load(logits, weights_only=True)
    opened, _ = open_plain(tmp_path / "run" / "hf")
    with torch.no_grad():
        assert torch.equal(opened.eval()(TOKENS).logits, trained)
        torch.testing.assert_close(reference(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)
    assert opened.config.topk == reference.config.topk
    record = json.loads((tmp_path / "run" / "hf" / "deepspeed_training.json").read_text())
    assert record["ranks"] == 2
    assert record["steps"] == STEPS


def test_stopped_run_goes_on_from_its_checkpoint_with_the_same_losses(
    plain: dict[str, tuple[list[float], Any]], folder: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    arguments = flags(folder, data["text"], "zero2", tmp_path / "run", "--save-every", "2")
    variables = {"TOPK_LOGITS": str(tmp_path / "logits.pt")}
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
    assert losses(tmp_path / "run") == pytest.approx(plain["text"][0], rel=RELATIVE)


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
