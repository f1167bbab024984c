"""Flags of what parallelism gains from sparsity, and the combinations that are refused."""

from argparse import Namespace
from typing import Any

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError


def add_parallel_arguments(group: Any) -> None:
    """Add the flags to the ``topk`` group of the parser."""
    group.add_argument(
        "--topk-sparse-p2p",
        action="store_true",
        help="send the hidden states and gradients between pipeline stages as their k kept entries "
        "where they come from a TopK layer; the results are bitwise those of dense transport",
    )
    group.add_argument(
        "--topk-sparse-save",
        action="store_true",
        help="keep outputs of TopK layers for the backward pass, also as inputs of full recompute, "
        "as their k kept entries; the results are bitwise the same",
    )
    group.add_argument(
        "--topk-verify",
        type=int,
        metavar="STEPS",
        help="compare every sparse transfer and saved activation with its dense form in every "
        "STEPS-th step, and end the run if they differ",
    )


def check_parallel(args: Namespace, config: TopKConfig) -> None:
    """Refuse combinations that the sparse forms cannot serve.

    Raises:
        ConfigError: names the flag to change.
    """
    if config.mlp_layers and args.moe_grouped_gemm:
        raise ConfigError(
            f"--topk-site {config.site} cannot enter grouped experts; drop --moe-grouped-gemm"
        )
    if args.topk_verify is not None:
        if args.topk_verify < 1:
            raise ConfigError(f"--topk-verify must be at least 1, got {args.topk_verify}")
        if not (args.topk_sparse_p2p or args.topk_sparse_save):
            raise ConfigError(
                "--topk-verify checks --topk-sparse-p2p and --topk-sparse-save; give one of them"
            )
    for flag in ("topk_sparse_p2p", "topk_sparse_save"):
        if getattr(args, flag):
            _check_sparse(args, config, f"--{flag.replace('_', '-')}")
    if args.topk_sparse_p2p:
        _check_transport(args)
    if args.topk_sparse_save:
        _check_saving(args)


def _check_sparse(args: Namespace, config: TopKConfig, flag: str) -> None:
    if not config.residual_layers:
        raise ConfigError(
            f"{flag} needs layers with a TopK on the residual stream, and this run has none; "
            "change --topk-layers or --topk-site, or drop the flag"
        )
    if args.cuda_graph_impl != "none":
        raise ConfigError(f"{flag} is not made for CUDA graphs; use --cuda-graph-impl none")
    if args.overlap_moe_expert_parallel_comm:
        raise ConfigError(f"{flag} does not go with --overlap-moe-expert-parallel-comm")


def _check_transport(args: Namespace) -> None:
    flag = "--topk-sparse-p2p"
    if args.pipeline_model_parallel_size == 1:
        raise ConfigError(f"{flag} needs --pipeline-model-parallel-size above 1")
    refused = {
        "use_ring_exchange_p2p": "--use-ring-exchange-p2p",
        "variable_seq_lengths": "--variable-seq-lengths: message sizes must be known beforehand",
        "sft": "--sft: message sizes must be known beforehand",
        "mtp_num_layers": "--mtp-num-layers",
    }
    for name, words in refused.items():
        if getattr(args, name, None):
            raise ConfigError(f"{flag} does not go with {words}")


def _check_saving(args: Namespace) -> None:
    flag = "--topk-sparse-save"
    if args.distribute_saved_activations:
        raise ConfigError(f"{flag} does not go with --distribute-saved-activations; drop one")
    for name in ("cpu_offloading", "fine_grained_activation_offloading"):
        if getattr(args, name, None):
            words = name.replace("_", "-")
            raise ConfigError(f"{flag} does not go with --{words}; drop one")
    if args.gradient_accumulation_fusion and args.recompute_granularity != "full":
        raise ConfigError(
            f"{flag} without full recompute needs --no-gradient-accumulation-fusion: the fused "
            "layers look for their weights' attributes, which saved-tensor hooks do not keep"
        )


def check_mlp(args: Namespace, config: TopKConfig) -> None:
    """Refuse MLP settings that do not fit the model, once Megatron has set its sizes.

    Raises:
        ConfigError: one line that says what to change. Widths of experts are checked when the
            model is built.
    """
    from topk_megatron.model.mlp import check_fit

    if config.mlp_layers and args.num_experts is None:
        check_fit(config, args.ffn_hidden_size, args.tensor_model_parallel_size)
