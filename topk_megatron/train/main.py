"""The steps of a pretraining run: parse, check, build, and hand over to Megatron."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError, UserError

# Megatron reports wrong arguments by assertions or by failing on them. While it reads arguments,
# each of these errors is a user's mistake.
_REFUSALS = (AssertionError, ValueError, TypeError, ZeroDivisionError, RuntimeError, OSError)


def parse(device: str, defaults: dict[str, Any] | None = None) -> tuple[Namespace, TopKConfig]:
    """Parse the command line, and validate it by our checks, Megatron's and the checkpoint's.

    Args:
        device: ``cuda`` or ``cpu``.
        defaults: values for arguments that the command line leaves out.

    Returns:
        Megatron's arguments, also set as its global ones, and the TopK settings. ``args.topk``
        holds these settings as a plain dictionary, so that every checkpoint stores them.

    Raises:
        UserError: if the command line, a file or the checkpoint has to change.
    """
    from megatron.training import get_tokenizer
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from topk_megatron.compat.select import fit_connections
    from topk_megatron.train.arguments import arguments_provider, dependent_defaults
    from topk_megatron.train.checks import check_arguments, check_mlp, check_settings
    from topk_megatron.train.resume import check_resume, choose_settings, open_resume

    early = parse_args(arguments_provider(device, defaults))
    fit_connections(early)
    dependent = dependent_defaults(early, device)
    vars(early).update(dependent)
    provider = arguments_provider(device, {**(defaults or {}), **dependent})
    resume = open_resume(early)
    config = choose_settings(early, resume)
    check_arguments(early, config, device)
    try:
        args = parse_and_validate_args(extra_args_provider=provider)
    except UserError:
        raise
    except _REFUSALS as error:
        raise ConfigError(f"Megatron refuses these arguments: {_reason(error)}") from error
    check_settings(args, config)
    check_mlp(args, config)
    args.topk = config.to_dict()
    # Megatron's padding of the vocabulary depends on the layout: compare the tokenizer's own size.
    tokenizer: Any = get_tokenizer()
    args.tokenizer_vocab_size = tokenizer.vocab_size
    if args.tokenizer_model is not None and Path(args.tokenizer_model).exists():
        # Other working directories read the checkpoint too.
        args.tokenizer_model = str(Path(args.tokenizer_model).resolve())
    check_resume(args, config, resume)
    return args, config


def _reason(error: Exception) -> str:
    """Return Megatron's message, or the failed assertion if there is no message."""
    if str(error):
        return " ".join(str(error).split())
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.line or f"an assertion at {last.filename}:{last.lineno}"


def be_one_process() -> None:
    """Make a script that was started without torchrun a job of one rank."""
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="localhost", MASTER_PORT="0")


def announce(args: Namespace, config: TopKConfig, device: str) -> None:
    """Print once what will be trained, and on which device."""
    from topk_megatron.train.arguments import describe_device

    if args.rank != 0:
        return
    print(describe_device(args, device), flush=True)
    if not config.layers:
        print("topk_megatron: dense model (no TopK layer)", flush=True)
        return
    layers = ", ".join(map(str, config.layers))
    sites = " and ".join(_describe_sites(config))
    print(f"topk_megatron: {sites} at layers {layers} of {config.num_layers}", flush=True)
    iterations = args.train_iters
    if config.anneal != "constant" and iterations and config.anneal_end > iterations:
        print(
            f"topk_megatron: annealing ends at iteration {config.anneal_end}, after the last one "
            f"({iterations}): k will not reach {config.k}",
            flush=True,
        )


def _describe_sites(config: TopKConfig) -> list[str]:
    sites = []
    if config.residual_layers:
        anneal = "constant"
        if config.anneal != "constant":
            anneal = (
                f"{config.anneal} from {config.start_k} over iterations "
                f"{config.anneal_begin} to {config.anneal_end}"
            )
        sites.append(f"k {config.k} of {config.hidden_size} ({config.mode}, {anneal})")
    if config.mlp_layers:
        groups = "over all units" if config.mlp_groups is None else f"in {config.mlp_groups} groups"
        sites.append(f"MLP k {config.mlp_k} ({config.mode}, {groups})")
    return sites


def run(device: str) -> None:
    """Pretrain; every rank calls this, under torchrun or as a single process."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from topk_megatron.compat import patches
    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import bind_topk
    from topk_megatron.train.data import datasets_provider
    from topk_megatron.train.interruptions import StopWatch, guarded_save
    from topk_megatron.train.metrics import MetricsLogger
    from topk_megatron.train.schedule import StepRunner
    from topk_megatron.train.step import forward_step

    be_one_process()
    patches.skip_dataset_compiler()
    patches.mark_saves_incomplete()
    patches.wrap_save(guarded_save)
    if device == "cpu":
        patches.count_packed_tokens_on_cpu()
    args, config = parse(device)
    announce(args, config, device)
    runtime = TopKRuntime(config, probing=args.topk_metrics)
    patches.wrap_schedule(StepRunner(args, runtime).run_step)
    if config.residual_layers and args.topk_metrics:
        patches.after_training_log(MetricsLogger(runtime).after_step)
    watch = StopWatch()
    patches.on_exit_decision(watch.on_exit)
    model = bind_topk(gpt_config_from_args(args), runtime)
    with leaving_groups():
        watch.run(
            args,
            lambda: pretrain(
                pretrain_cfg_container_from_args(args, model),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            ),
        )


@contextlib.contextmanager
def leaving_groups() -> Iterator[None]:
    """Destroy the process groups after a run that ended by itself or was asked to stop.

    Otherwise the threads of their backends are still alive while the interpreter shuts down, and a
    rank whose training is complete may abort there. After an error nothing is destroyed: NCCL would
    wait for ranks that may be gone.
    """
    try:
        yield
    except SystemExit:
        _destroy_groups()
        raise
    _destroy_groups()


def _destroy_groups() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
