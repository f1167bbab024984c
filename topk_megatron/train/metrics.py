"""Statistics of the TopK layers, reduced over all ranks and written where Megatron writes its own.

Ratios are computed from sums over every rank of the job. Without sequence parallelism,
tensor-parallel ranks see the same tokens and count them equally often in both sums. A layer is on
the ranks of one pipeline stage, and the other stages add nothing to its sums.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from topk_megatron.model.probe import NEVER_SEEN
from topk_megatron.model.runtime import TopKRuntime


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """Statistics of one TopK layer over one logged step.

    Attributes:
        layer: number of the layer, counted from 0.
        density: share of outputs that are selected, counted from the selections; k / H if they are
            right.
        kept_norm: share of the squared norm that survives the TopK.
        silent: share of neurons that were not selected for the last `silent_tokens` tokens.
    """

    layer: int
    density: float
    kept_norm: float
    silent: float


def gather_metrics(
    runtime: TopKRuntime, silent_tokens: int, seen_tokens: int
) -> list[LayerMetrics]:
    """Reduce the probes of all ranks; every rank must call this and gets the result.

    The counters start with the process, so a neuron is silent if it was not
    selected for min(silent_tokens, seen_tokens) tokens.

    Args:
        runtime: this rank's TopK layers.
        silent_tokens: tokens for which a silent neuron is not selected.
        seen_tokens: tokens trained on since this process started.
    """
    config = runtime.config
    device = torch.device(torch.cuda.current_device())
    layers = config.residual_layers
    sums = torch.zeros(len(layers), 4, dtype=torch.float64, device=device)
    silent = torch.full(
        (len(layers), config.hidden_size), NEVER_SEEN, dtype=torch.int64, device=device
    )
    for row, layer in enumerate(layers):
        probe = runtime.probes.get(layer)
        if probe is not None:
            sums[row] = probe.take_sums(device)
            if probe.silent_tokens is not None:
                silent[row] = probe.silent_tokens
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    dist.all_reduce(silent, op=dist.ReduceOp.MIN)
    window = min(silent_tokens, seen_tokens)
    shares = (silent >= window).double().mean(dim=1)
    table = torch.cat([sums, shares.unsqueeze(1)], dim=1).tolist()
    return [
        LayerMetrics(
            layer=layer,
            density=nonzero / max(outputs, 1.0),
            kept_norm=kept / norm if norm else 0.0,
            silent=share,
        )
        for layer, (nonzero, outputs, kept, norm, share) in zip(layers, table, strict=True)
    ]


class MetricsLogger:
    """Gathers and writes statistics at Megatron's log interval; called after every training step.

    Attributes:
        runtime: this rank's TopK layers.
        seen_tokens: tokens trained on since this process started.
    """

    def __init__(self, runtime: TopKRuntime) -> None:
        self.runtime = runtime
        self.seen_tokens = 0

    def after_step(self, iteration: int) -> None:
        """Close the step numbered `iteration`, counted from 1 as Megatron does."""
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.training import get_args

        args: Any = get_args()
        tokens = get_current_global_batch_size() * args.seq_length
        self.seen_tokens += tokens
        for probe in self.runtime.probes.values():
            probe.end_step(tokens)
        if iteration % args.log_interval == 0:
            metrics = gather_metrics(self.runtime, args.topk_silent_tokens, self.seen_tokens)
            self._write(iteration, metrics)

    def _write(self, iteration: int, metrics: list[LayerMetrics]) -> None:
        from megatron.training import get_tensorboard_writer, print_rank_last
        from megatron.training.global_vars import get_wandb_writer

        scalars = {"topk/k": float(self.runtime.k)}
        for m in metrics:
            for name in ("density", "kept_norm", "silent"):
                scalars[f"topk/{name}/layer_{m.layer:02d}"] = getattr(m, name)
        if writer := get_tensorboard_writer():
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log(scalars, iteration)
        print_rank_last(format_metrics(iteration, self.runtime, metrics))


def format_metrics(iteration: int, runtime: TopKRuntime, metrics: list[LayerMetrics]) -> str:
    """Format one console line with a value per TopK layer, in the order of the layers."""

    def row(name: str) -> str:
        return " ".join(f"{100 * getattr(m, name):.3g}" for m in metrics)

    layers = " ".join(str(m.layer) for m in metrics)
    return (
        f" topk {iteration:8d} | k: {runtime.k} of {runtime.config.hidden_size} | "
        f"layers: {layers} | "
        f"density %: {row('density')} | kept norm² %: {row('kept_norm')} | "
        f"silent %: {row('silent')} |"
    )
