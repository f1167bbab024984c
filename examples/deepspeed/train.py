"""Trains an exported TopK LM further with DeepSpeed: pretraining on text, or fine-tuning.

    torchrun --nproc-per-node 2 examples/deepspeed/train.py --model hf/topk --data tuning.jsonl \\
        --config examples/deepspeed/zero2.json --save runs/tuned --steps 50

A line of --data is {"text": …}, or {"prompt": …, "completion": …} with the loss on the completion.
The same command continues from the last checkpoint in --save. At the end, --save/hf is a folder
like --model. The `deepspeed` launcher starts this script too.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from batches import Batches, read_sequences, summed_loss
from model import check_folder, open_model, open_tokenizer, write_folder

from topk_megatron.cli import exit_on_user_error
from topk_megatron.compat.accelerators import check_gpus
from topk_megatron.errors import CheckpointError, ConfigError

DTYPES = ("float32", "bfloat16")
REQUIRED = ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "zero_optimization")
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="exported TopK LM; runs its modeling code")
    add("--data", nargs="+", required=True, help=".jsonl files or globs; .gz and .zst too")
    add("--config", type=Path, required=True, help="DeepSpeed's JSON, such as zero2.json")
    add("--save", type=Path, required=True, help="folder for checkpoints, log.jsonl and hf/")
    add("--steps", type=int, required=True, help="optimizer steps")
    add("--seq-length", type=int, help="tokens of the longest sequence (default: the model's)")
    add("--lr", type=float, help="largest learning rate (default: the one in --config)")
    add("--warmup", type=int, default=10, help="steps of linear warmup; then a cosine to a tenth")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on GPUs, float32 on CPUs")
    add("--seed", type=int, default=0, help="seed of the order of the data")
    add("--save-every", type=int, default=100, help="steps between checkpoints; 0: only at SIGTERM")
    add("--keep", type=int, default=2, help="number of checkpoints to keep")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args()


def import_deepspeed() -> Any:
    """Import DeepSpeed; on a machine without GPUs, have it use the CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported ({error}); install it: pip install "
            "'topk-megatron[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel("WARNING")
    # This collective for inference on CPUs would compile for a minute and never be called.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return DeepSpeed's settings: the file's, completed from the flags and the ranks."""
    try:
        settings = json.loads(args.config.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {args.config} cannot be read: {error}") from error
    if lost := [name for name in REQUIRED if name not in settings]:
        raise ConfigError(f"--config {args.config} lacks {', '.join(lost)}")
    ranks = int(os.environ["WORLD_SIZE"])
    batch, micro = settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]
    if batch % (micro * ranks):
        raise ConfigError(
            f"train_batch_size={batch} of {args.config} must be a multiple of "
            f"train_micro_batch_size_per_gpu={micro} times {ranks} ranks; change one of them"
        )
    settings["gradient_accumulation_steps"] = batch // (micro * ranks)
    settings["bf16"] = {"enabled": args.dtype == "bfloat16"}
    settings["steps_per_print"] = args.steps + 1
    if args.lr is not None:
        settings["optimizer"]["params"]["lr"] = args.lr
    return settings


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of a step, counted from 0: linear to the peak, then a cosine to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Runs the loop over steps, and writes its checkpoints and its log.

    Args:
        engine: DeepSpeed's engine.
        batches: The data.
        args: The command line.
        identity: The settings that `identity_of` returns.
    """

    def __init__(
        self, engine: Any, batches: Batches, args: argparse.Namespace, identity: dict[str, Any]
    ) -> None:
        self.engine, self.batches, self.args, self.identity = engine, batches, args, identity
        self.checkpoints = args.save / "checkpoints"
        self.log = args.save / "log.jsonl"
        self.first = engine.global_rank == 0
        self.stopping = False

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; return the number of finished steps."""
        done = 0
        if (self.checkpoints / "latest").is_file():
            _, state = self.engine.load_checkpoint(str(self.checkpoints))
            done = int(state["step"])
        elif self.first:
            text = json.dumps(self.identity, indent=2)
            (self.args.save / "run.json").write_text(text + "\n")
        if self.first:
            lines = self.log.read_text().splitlines(keepends=True) if done else []
            self.log.write_text("".join(lines[:done]))  # later steps run again
            print(f"starting after step {done} of {self.args.steps}", flush=True)
        return done

    def run(self, done: int) -> bool:
        """Train; return whether the last step was reached."""
        signal.signal(signal.SIGTERM, self._stop)
        for step in range(done, self.args.steps):
            started = time.perf_counter()
            rate = learning_rate(
                step, self.args.steps, self.identity["learning rate"], self.args.warmup
            )
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            loss, stopping = self.step(step)
            if self.first:
                self._report(step + 1, loss, rate, time.perf_counter() - started)
            due = self.args.save_every and (step + 1) % self.args.save_every == 0
            if (due or stopping) and step + 1 < self.args.steps:
                self._save(step + 1)
                if stopping:
                    self._say_stopped(step + 1)
                    return False
        return True

    def step(self, number: int) -> tuple[float, bool]:
        """Take one optimizer step; return its loss per token, and whether any rank must stop."""
        engine, sequences = self.engine, self.batches.step(number)
        micro, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        targets = sum(sequence.num_targets for sequence in sequences)
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        total[1] = self.stopping
        for part in range(parts):
            place = (part * engine.world_size + engine.global_rank) * micro
            loss = summed_loss(engine, self.batches, sequences[place : place + micro])
            # DeepSpeed averages over ranks and parts; this factor makes it a mean over tokens.
            engine.backward(loss * (engine.world_size * parts / targets))
            engine.step()
            total[0] += loss.detach()
        torch.distributed.all_reduce(total)
        return total[0].item() / targets, bool(total[1] > 0)

    def _report(self, step: int, loss: float, rate: float, seconds: float) -> None:
        line = {"step": step, "loss": loss, "learning_rate": rate, "seconds": round(seconds, 3)}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"step {step} of {self.args.steps}: loss {loss:.4f}, {seconds:.2f} s", flush=True)

    def _save(self, step: int) -> None:
        self.engine.save_checkpoint(
            str(self.checkpoints), tag=f"step_{step:07d}", client_state={"step": step}
        )
        if self.first:
            for old in sorted(self.checkpoints.glob("step_*"))[: -self.args.keep]:
                shutil.rmtree(old)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _say_stopped(self, step: int) -> None:
        """Tell the user, and topk_megatron.train.launch, which then exits with code 75."""
        said = f"stopped by a signal after step {step}, saved in {self.checkpoints}"
        note = os.environ.get("TOPK_STOP_NOTE")
        if note is not None and os.environ["LOCAL_RANK"] == "0":
            Path(note).write_text(said)
        if self.first:
            print(said, flush=True)


def check(args: argparse.Namespace) -> None:
    """Check what the command line alone can get wrong."""
    target = args.save / "hf"
    if target.exists():
        raise CheckpointError(f"{target} already exists: this run is finished; give another --save")
    for name in ("steps", "keep"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")


def identity_of(
    args: argparse.Namespace, settings: dict[str, Any], length: int, sequences: int
) -> dict[str, Any]:
    """Return the settings that a run must share with a checkpoint to continue from it."""
    return {
        "ranks": int(os.environ["WORLD_SIZE"]),
        "ZeRO stage": settings["zero_optimization"]["stage"],
        "dtype": args.dtype,
        "train_batch_size": settings["train_batch_size"],
        "steps": args.steps,
        "learning rate": settings["optimizer"]["params"]["lr"],
        "sequence length": length,
        "sequences": sequences,
        "seed": args.seed,
    }


def check_same_run(save: Path, identity: dict[str, Any]) -> None:
    """Refuse checkpoints of a different run: DeepSpeed saves each rank's own parts."""
    checkpoints = save / "checkpoints"
    if not (checkpoints / "latest").is_file():
        return
    before = json.loads((save / "run.json").read_text())
    for name, value in identity.items():
        if before.get(name) != value:
            raise CheckpointError(
                f"{checkpoints} belongs to a run with {name}={before.get(name)}, but this run has "
                f"{value}; use the same value, or another --save"
            )


@exit_on_user_error
def main() -> None:
    """Open the model, train it and write the folder."""
    args = parse()
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    check(args)
    if torch.cuda.is_available():
        check_gpus(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    config = check_folder(args.model)
    settings = read_settings(args)
    tokenizer = open_tokenizer(args.model, config["vocab_size"])
    length = args.seq_length or config["max_position_embeddings"]
    if not 2 <= length <= config["max_position_embeddings"]:
        raise ConfigError(
            f"--seq-length must be in [2, {config['max_position_embeddings']}], got {length}"
        )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    sequences, said = read_sequences(args.data, encode, tokenizer.eos_token_id, length)
    identity = identity_of(args, settings, length, len(sequences))
    check_same_run(args.save, identity)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed()
    args.save.mkdir(parents=True, exist_ok=True)
    if torch.distributed.get_rank() == 0:
        print(f"data: {said}", flush=True)
    model = open_model(args.model, args.dtype, settings).train()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=settings
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = Batches(sequences, settings["train_batch_size"], args.seed, pad)
    trainer = Trainer(engine, batches, args, identity)
    if trainer.run(trainer.resume()):
        record = {**identity, "model": str(args.model), "data": args.data, "settings": settings}
        write_folder(engine, args.model, args.save / "hf", record)
        if trainer.first:
            print(f"wrote {args.save / 'hf'}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
