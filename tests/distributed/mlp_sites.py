"""Compares Megatron's MLPs with a TopK to the formula of docs/mlp.md on whole weights.

An entry for `tests.harness.launch.pretrain` with two tensor-parallel ranks. Every case builds one
of Megatron's MLPs, gathers its weights, and computes the result by definition.
"""

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.traffic import counted_traffic
from topk_megatron.compat import prepare_device
from topk_megatron.ops.reference import topk_mask_reference

HIDDEN, WIDTH, TOKENS = 32, 48, 10


def whole(part: Tensor, group: Any, dim: int) -> Tensor:
    """Gather all ranks' parts of a weight or activation, in rank order."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def activation_by_definition(mlp: Any, x: Tensor) -> Tensor:
    """Compute the whole activation before the TopK: [tokens, F]."""
    weight, bias = mlp.linear_fc1.weight, mlp.linear_fc1.bias
    pre = x @ weight.T if bias is None else x @ weight.T + bias
    if mlp.config.gated_linear_unit:
        gate, up = pre.chunk(2, dim=-1)
        return whole(mlp.config.activation_func(gate) * up, mlp.tp_group, -1)
    return whole(mlp.config.activation_func(pre), mlp.tp_group, -1)


def select(activation: Tensor, config: Any) -> Tensor:
    """Select by the reference of the TopK."""
    groups = config.mlp_groups or 1
    parts = activation.chunk(groups, dim=-1)
    return torch.cat(
        [topk_mask_reference(part, config.mlp_k // groups, config.mode)[0] for part in parts], -1
    )


def compare(mlp: Any, topk: Any, x: Tensor, weights: Tensor | None) -> dict[str, Any]:
    """Compare the MLP with the definition, and count the bytes exchanged."""
    seen: list[Tensor] = []
    handle = mlp.topk.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad(), counted_traffic() as traffic:
        output, bias = mlp(x, weights)
    handle.remove()
    selected = select(activation_by_definition(mlp, x), topk)
    fc2 = mlp.linear_fc2
    if weights is None:
        wanted = selected @ whole(fc2.weight, mlp.tp_group, 1).T
    else:  # the token dispatcher, not the expert, sums an expert's outputs over ranks
        part = selected.chunk(mlp.tp_group.size(), dim=-1)[mlp.tp_group.rank()]
        wanted = (part * weights.unsqueeze(-1)) @ fc2.weight.T
        if fc2.bias is not None:
            assert bias is None
            wanted = wanted + fc2.bias * weights.unsqueeze(-1)
    return {
        "selection_equal": torch.equal(whole(seen[0], mlp.tp_group, -1), selected),
        "output_error": float((output - wanted).abs().max()),
        "exchanged_bytes": traffic.bytes["all_gather"],
    }


def build(args: Any, gated: bool, biased: bool, expert: bool) -> Any:
    """Build one of Megatron's MLPs, as its own specs would."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.training.argument_utils import core_transformer_config_from_args

    config: Any = core_transformer_config_from_args(args)
    config.gated_linear_unit, config.add_bias_linear = gated, biased
    config.activation_func = torch.nn.functional.silu if gated else torch.nn.functional.gelu
    config.hidden_size, config.ffn_hidden_size = HIDDEN, WIDTH
    group: Any
    if expert:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    parts: Any = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, parts, is_expert=expert, ffn_hidden_size=WIDTH, tp_group=group)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for name, parameter in mlp.named_parameters():
        if name == "linear_fc2.bias":  # the same on every rank
            generator = torch.Generator().manual_seed(9)
        # Few distinct numbers, so that activations tie within and across ranks.
        parameter.data.copy_((torch.randn(parameter.shape, generator=generator) * 2).round() / 4)
    return mlp


def main() -> None:
    """Compare every kind of MLP with every kind of selection."""
    device = prepare_device()
    from megatron.training.initialize import initialize_megatron

    from topk_megatron.compat.patches import skip_dataset_compiler
    from topk_megatron.config import TopKConfig
    from topk_megatron.model.mlp import add_topk
    from topk_megatron.train.main import parse

    skip_dataset_compiler()
    args, _ = parse(device)
    initialize_megatron()
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(TOKENS, HIDDEN, generator=generator) * 2).round() / 4
    probabilities = torch.rand(TOKENS, generator=generator)
    report = {}
    kinds = product((True, False), (True, False), (True, False), (None, 2), ("value", "abs"))
    for gated, biased, expert, groups, mode in kinds:
        topk: Any = TopKConfig(
            hidden_size=HIDDEN, num_layers=1, k=1, layers=(0,), site="mlp", mlp_k=6,
            mlp_groups=groups, mode=mode,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        mlp = build(args, gated, biased, expert)
        add_topk(mlp, topk)
        name = f"gated={gated} biased={biased} expert={expert} groups={groups} {mode}"
        report[name] = compare(mlp, topk, x, probabilities if expert else None)
    path = Path(os.environ["TOPK_REPORT"]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
