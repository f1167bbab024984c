"""TopK on the activation inside the MLP (docs/mlp.md), for dense, gated and expert MLPs.

Megatron's MLP computes fc1, the activation and fc2 in one method, in five fused and unfused ways.
All of them end in a call of fc2, so the TopK is a module of the MLP that runs on fc2's input.
Experts multiply their activation by the token's routing weight before fc2. Here the MLP is called
without the weight, and this module multiplies by it after the TopK, as Megatron would have.

Shapes: x_TP has T tokens (any leading dimensions) and P = F / p units of this tensor-parallel rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.parallel.tensor import global_topk_mask, grouped_topk_mask


class TopKActivation(nn.Module):
    """The TopK of one MLP, without parameters.

    Attributes:
        config: settings of the model.
        group: tensor-parallel group of the MLP; for an expert, the experts' group.
    """

    def __init__(
        self, config: TopKConfig, group: Any, applied: Callable[[bool], None] | None = None
    ) -> None:
        """Make the TopK of an MLP that `attach` will be given.

        Args:
            config: settings of the model.
            group: tensor-parallel group of the MLP; for an expert, the experts' group.
            applied: called at each application with whether the MLP is training.
        """
        super().__init__()
        self.config = config
        self.group = group
        self._applied = applied
        self._weights: Tensor | None = None

    def forward(self, x_TP: Tensor) -> Tensor:
        """Keep the gated activation on S and return +0 elsewhere."""
        if self._applied is not None:
            self._applied(self.training)
        k, groups, mode = self.config.mlp_k, self.config.mlp_groups, self.config.mode
        assert k is not None
        if groups is None:
            return global_topk_mask(x_TP, k, mode=mode, group=self.group)
        size = self.group.size()
        return grouped_topk_mask(x_TP, k // size, groups // size, mode=mode)

    def attach(self, mlp: MLP) -> None:
        """Make this module run on every call of the MLP's fc2."""
        mlp.register_forward_pre_hook(self._take_weights, with_kwargs=True)
        fc2: Any = mlp.linear_fc2
        fc2.register_forward_pre_hook(self._before_fc2)
        mlp.register_forward_hook(self._weigh_bias)

    def _take_weights(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Withhold the routing weights from the MLP."""
        names = ("hidden_states", "per_token_scale")
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._weights = inputs.pop("per_token_scale", None)
        return (inputs.pop("hidden_states"),), inputs

    def _before_fc2(self, _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output = self(args[0])
        if self._weights is not None:
            output = (output * self._weights.unsqueeze(-1)).to(output.dtype)
        return (output, *args[1:])

    def _weigh_bias(self, _: Any, __: Any, output: Any) -> Any:
        weights, self._weights = self._weights, None
        if weights is None or not isinstance(output, tuple) or output[1] is None:
            return output
        # An expert's bias is weighted too, and added here (megatron/core/transformer/mlp.py).
        return output[0] + output[1].unsqueeze(0) * weights.unsqueeze(-1), None


def add_topk(
    layer: torch.nn.Module, config: TopKConfig, applied: Callable[[bool], None] | None = None
) -> None:
    """Give every MLP of a transformer layer, experts included, its TopK.

    Args:
        layer: the layer, or the part of it that holds its MLPs.
        config: settings of the model.
        applied: called at each application with whether the layer is training.

    Raises:
        ConfigError: if the layer's MLP is fused, so that the TopK cannot enter it, or its width or
            layout does not fit the settings.
    """
    mlps = [module for module in layer.modules() if isinstance(module, MLP)]
    if not mlps:
        raise ConfigError(
            "--topk-site mlp cannot enter any MLP of this layer (its experts are grouped or "
            "fused); use --topk-site residual, or drop --moe-grouped-gemm and --use-te-op-fuser"
        )
    for mlp in mlps:
        group: Any = mlp.tp_group
        size = group.size()
        check_fit(config, local_width(mlp) * size, size)
        mlp.topk = TopKActivation(config, group, applied)
        mlp.topk.attach(mlp)


def local_width(mlp: MLP) -> int:
    """Return the number of units of the MLP's inner dimension on this rank."""
    rows: int = mlp.linear_fc1.weight.shape[0]  # pyright: ignore
    return rows // 2 if mlp.config.gated_linear_unit else rows


def check_fit(config: TopKConfig, width: int, tensor_parallel_size: int) -> None:
    """Check that the settings fit an inner dimension of `width` units.

    Raises:
        ConfigError: if they do not; the message says which number to change.
    """
    assert config.mlp_k is not None
    if config.mlp_k > width:
        raise ConfigError(
            f"--topk-mlp-k must be at most the MLP's inner dimension, {width}, got {config.mlp_k}"
        )
    groups = config.mlp_groups
    if groups is None:
        return
    if width % groups:
        raise ConfigError(
            f"--topk-mlp-groups must divide the MLP's inner dimension, {width}, got {groups}"
        )
    if groups % tensor_parallel_size:
        raise ConfigError(
            f"--topk-mlp-groups {groups} cannot be split over {tensor_parallel_size} "
            "tensor-parallel ranks; use a multiple of the tensor-parallel size, or drop the flag "
            "to select over all ranks"
        )
