"""Build every pipeline stage of a model without memory or hardware, and check the result.

One process plays the first tensor-parallel rank of each stage in turn, with Megatron's fake process
group. The arguments pass the checks of a training run, and the code of such a run builds the model.
Only the tensors differ: they are on the meta device, which has shapes but no memory.

Two things would still allocate memory. ``torch.device("meta")`` does not reach factories that the
CPU layer has wrapped, which would silently continue to allocate; a mode of our own redirects them.
And Megatron's CPU initialisation makes every matrix whole and in float32, for all tensor-parallel
ranks, before it takes this rank's part (9 GB for one matrix of a 500B model); it is switched off.
"""

import contextlib
import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from topk_megatron.compat import prepare_device
from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.plan.command_lines import layout_in, shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.shape import Shape, Shapes

_FACTORIES = {"arange", "empty", "eye", "full", "ones", "rand", "randn", "tensor", "zeros"}
# The dimension in which tensor-parallel ranks split a parameter; each rank has the others whole.
_SHARDED = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage as built for tensor-parallel rank 0.

    Attributes:
        number: The number of the stage, from 0.
        layers: Numbers of its layers, from 0 over the whole model.
        topk_layers: Numbers of its layers that have a TopK.
        shapes: The shape of every parameter, by name.
        parameters: Number of parameters on this rank.
        output: The shape of the stage's output for one microbatch.
    """

    number: int
    layers: tuple[int, ...]
    topk_layers: tuple[int, ...]
    shapes: Shapes
    parameters: int
    output: tuple[int, ...]


def dry_run(flags: Sequence[str]) -> list[Stage]:
    """Build and check all stages of the layout that `flags` ask for, with one replica.

    Args:
        flags: Pretraining flags with ``--vocab-size``; data, tokenizer and folders are not needed.

    Returns:
        The stages, each equal to the plan.

    Raises:
        ConfigError: If a training run would refuse the flags, or a stage differs from the plan.
    """
    shape = shape_of(flags)
    own = layout_in(flags)
    if own.tp > 1 and "--sequence-parallel" not in flags:
        raise ConfigError("plans assume tensor parallelism with --sequence-parallel; add the flag")
    prepare_device()
    with rank_zero(own.ranks), _quiet():
        args, config = _arguments(flags)
        stages = []
        for number in range(own.pp):
            stages.append(_build(args, config, shape, own, number))
            gc.collect()
    for stage in stages:
        check_stage(shape, own, stage)
    return stages


def check_stage(shape: Shape, layout: Layout, stage: Stage) -> None:
    """Check a stage against the plan.

    Raises:
        ConfigError: If layers, TopK layers, a parameter or the output differ; names the first one.
    """
    planned_layers = tuple(shape.stage_layers(layout.pp, stage.number))
    chosen = tuple(layer for layer in planned_layers if layer in shape.topk.layers)
    pairs: dict[str, tuple[Any, Any]] = {
        "layers": (stage.layers, planned_layers),
        "TopK layers": (stage.topk_layers, chosen),
        "output": (stage.output, _planned_output(shape, layout, stage.number)),
    }
    planned = shape.stage_shapes(layout.tp, layout.pp, stage.number)
    for name in sorted(planned.keys() | stage.shapes.keys()):
        pairs[name] = stage.shapes.get(name), planned.get(name)
    for name, (built, expected) in pairs.items():
        if built != expected:
            raise ConfigError(
                f"stage {stage.number} is not as planned: {name} is {built}, the plan has "
                f"{expected}; a flag unknown to the planner changes the model"
            )


def stage_table(stages: list[Stage]) -> str:
    """Return a table with one line per stage."""
    lines = [f"{'stage':>5} {'layers':>9} {'with TopK':>9} {'parameters/rank':>18}  output"]
    for stage in stages:
        layers = f"{stage.layers[0]}-{stage.layers[-1]}"
        chosen = f"{len(stage.topk_layers)} of {len(stage.layers)}"
        lines.append(
            f"{stage.number:>5} {layers:>9} {chosen:>9} {stage.parameters:>18,}  {stage.output}"
        )
    return "\n".join(lines)


class _OnMeta(TorchFunctionMode):
    """Does what `torch.device("meta")` does, also where torch's factories are wrapped."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _arguments(flags: Sequence[str]) -> tuple[Any, TopKConfig]:
    """Return Megatron's arguments and the TopK settings, after the checks of a training run."""
    from topk_megatron.train.main import parse

    extra = ["--fake-process-group", "--mock-data", "--no-initialization"]
    extra += ["--tokenizer-type", "NullTokenizer"]  # which has --vocab-size pieces
    before = sys.argv
    sys.argv = ["dry-run", *flags, *extra]
    try:
        return parse("cpu")
    finally:
        sys.argv = before


def _build(args: Any, config: TopKConfig, shape: Shape, layout: Layout, number: int) -> Stage:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from topk_megatron.model.runtime import TopKRuntime
    from topk_megatron.model.spec import build_model

    rank = number * layout.tp  # Megatron's order is tp-dp-pp, here with one replica
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        parallel_state.initialize_model_parallel(layout.tp, layout.pp)
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
        with _OnMeta():
            model = build_model(args, TopKRuntime(config, probing=False))
            output = _forward(model.eval(), shape, layout, number)
        return _describe(model, number, output)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _forward(model: Any, shape: Shape, layout: Layout, number: int) -> tuple[int, ...]:
    """Return the output's shape for one microbatch; the fake group's collectives do nothing."""
    ids_BS = torch.zeros(shape.micro_batch, shape.sequence, dtype=torch.long)
    if number > 0:
        received = _hidden(shape, layout)
        model.set_input_tensor(torch.empty(received, dtype=model.config.params_dtype))
    with torch.no_grad():
        output = model(ids_BS, ids_BS, None)
    assert output.is_meta
    return tuple(output.shape)


def _describe(model: Any, number: int, output: tuple[int, ...]) -> Stage:
    parameters = dict(model.named_parameters())
    real = [name for name, parameter in parameters.items() if not parameter.is_meta]
    assert not real, f"allocated: {real}"
    for name, parameter in parameters.items():
        check_shard(name, parameter)
    layers = [(layer.layer_number - 1, layer) for layer in model.decoder.layers]
    return Stage(
        number=number,
        layers=tuple(index for index, _ in layers),
        topk_layers=tuple(
            index for index, layer in layers if getattr(layer, "topk_layer", None) is not None
        ),
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        output=output,
    )


def check_shard(name: str, parameter: Any) -> None:
    """Check that Megatron will split the parameter over tensor-parallel ranks as planned.

    Raises:
        ConfigError: If it is split in another dimension, or not at all.
    """
    planned = next((dim for end, dim in _SHARDED.items() if name.endswith(end)), None)
    is_shared = getattr(parameter, "tensor_model_parallel", False)
    built = parameter.partition_dim if is_shared else None
    if built != planned:
        raise ConfigError(
            f"{name} is split over tensor-parallel ranks in dimension {built}, expected {planned}"
        )


def _hidden(shape: Shape, layout: Layout) -> tuple[int, int, int]:
    """Return the shape [s / tp, b, h] of what stages pass on, under sequence parallelism."""
    return shape.sequence // layout.tp, shape.micro_batch, shape.hidden


def _planned_output(shape: Shape, layout: Layout, number: int) -> tuple[int, ...]:
    if number < layout.pp - 1:
        return _hidden(shape, layout)
    return shape.micro_batch, shape.sequence, shape.padded(layout.tp) // layout.tp


@contextlib.contextmanager
def rank_zero(world_size: int) -> Iterator[None]:
    """Be the first of `world_size` ranks; on exit, clear Megatron's globals."""
    before = dict(os.environ)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    try:
        yield
    finally:
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
        from megatron.training.global_vars import destroy_global_vars

        destroy_global_vars()
        destroy_num_microbatches_calculator()
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Megatron's 700 lines of arguments and its warnings about every stage."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
