"""The ``--topk-…`` flags, and new values for those of Megatron's defaults that cannot work."""

from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn, get_args

from topk_megatron.compat.accelerators import describe, find_accelerators, gpu_defaults
from topk_megatron.compat.patches import repair_help
from topk_megatron.config import DEFAULT_HIDDEN_PER_K, DEFAULT_LAYERS, Anneal, Mode, Site
from topk_megatron.errors import ConfigError

# Megatron's defaults on a machine without CUDA: gloo instead of NCCL, Megatron's own modules
# instead of Transformer Engine's, and no kernel that only GPUs have.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}


def add_topk_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags, as Megatron's `extra_args_provider` does."""
    group = parser.add_argument_group(
        "topk", "TopK language model: hidden states that keep their k largest neurons."
    )
    group.add_argument(
        "--topk-k",
        type=int,
        metavar="K",
        help="how many of the --hidden-size neurons survive at each TopK layer; the hidden size "
        f"itself gives the dense model (default: hidden size / {DEFAULT_HIDDEN_PER_K})",
    )
    group.add_argument(
        "--topk-layers",
        metavar="LAYERS",
        help="layers with a TopK, counted from 0: for example 0-9, 0,2,5, all, all,-2 (all but the "
        f"last two) or none (the dense model) (default: {DEFAULT_LAYERS})",
    )
    group.add_argument(
        "--topk-mode",
        choices=get_args(Mode),
        help="keep the largest values or the largest magnitudes (default: value)",
    )
    group.add_argument(
        "--topk-anneal",
        choices=get_args(Anneal),
        help="how k moves from its start to --topk-k; exponential is linear in log k "
        "(default: constant)",
    )
    group.add_argument(
        "--topk-anneal-start-k",
        type=int,
        metavar="K",
        help="k before annealing begins (default: the hidden size)",
    )
    group.add_argument(
        "--topk-anneal-begin",
        type=int,
        metavar="ITERATION",
        help="iteration at which k begins to change (default: 0)",
    )
    group.add_argument(
        "--topk-anneal-end",
        type=int,
        metavar="ITERATION",
        help="iteration from which k is --topk-k (default: halfway from --topk-anneal-begin to "
        "--train-iters)",
    )
    group.add_argument(
        "--topk-site",
        choices=get_args(Site),
        help="where the layers in --topk-layers have their TopK: on the residual stream after the "
        "layer, on the activation inside the MLP, or both (default: residual)",
    )
    group.add_argument(
        "--topk-mlp-k",
        type=int,
        metavar="K",
        help="how many of the --ffn-hidden-size units of the MLP's activation survive; required by "
        "--topk-site mlp and both",
    )
    group.add_argument(
        "--topk-mlp-groups",
        type=int,
        metavar="G",
        help="select K / G units in each of G equal groups of the FFN dimension, without "
        "communication if the tensor-parallel size divides G (default: the K largest of all, over "
        "all tensor-parallel ranks)",
    )
    group.add_argument(
        "--topk-override",
        action="store_true",
        help="resume even if the checkpoint was written with different TopK settings",
    )
    group.add_argument(
        "--topk-trust-checkpoint",
        action="store_true",
        help="let Megatron open a checkpoint even if it holds objects of classes that no "
        "checkpoint needs; such an object can run code",
    )
    group.add_argument(
        "--topk-silent-tokens",
        type=int,
        default=100_000,
        metavar="TOKENS",
        help="a neuron is silent once none of this many tokens selected it (default: %(default)s)",
    )
    group.add_argument(
        "--no-topk-metrics",
        action="store_false",
        dest="topk_metrics",
        help="do not gather and log density, kept norm and silent neurons of TopK layers",
    )
    _add_parallel_arguments(group)
    return parser


def _add_parallel_arguments(group: Any) -> None:
    group.add_argument(
        "--topk-sparse-p2p",
        action="store_true",
        help="send a TopK layer's hidden states and their gradients between pipeline stages as "
        "their k kept entries; results are bitwise those of dense transport",
    )
    group.add_argument(
        "--topk-sparse-save",
        action="store_true",
        help="keep outputs of TopK layers for the backward pass (also as inputs of full recompute) "
        "as their k kept entries; results are bitwise the same",
    )
    group.add_argument(
        "--topk-verify",
        type=int,
        metavar="STEPS",
        help="every STEPS steps, compare each sparse transfer and saved activation with its dense "
        "form, and end the run if they differ",
    )


def arguments_provider(device: str, defaults: dict[str, Any] | None = None) -> Any:
    """Return the parser hook that adds our flags and adapts Megatron's defaults to this machine.

    Args:
        device: ``cuda`` or ``cpu``.
        defaults: more defaults, by argument name.
    """

    def provider(parser: ArgumentParser) -> ArgumentParser:
        add_topk_arguments(parser)
        repair_help(parser)
        parser.error = _raise_usage  # pyright: ignore[reportAttributeAccessIssue]
        # Megatron 0.19 divides by this flag and has no default for it.
        parser.set_defaults(eval_interval=1000)
        # A run that is asked to stop saves first, and a loss that is not finite ends it in that
        # very step. Megatron's search for hardware faults (--rerun-mode validate_results) is
        # experimental and does not check the first step.
        parser.set_defaults(exit_signal_handler=True, rerun_mode="disabled")
        missing = CPU_DEFAULTS if device == "cpu" else gpu_defaults(find_accelerators())
        parser.set_defaults(**missing)
        parser.set_defaults(**(defaults or {}))
        return parser

    return provider


def _raise_usage(message: str) -> NoReturn:
    # argparse would print Megatron's 700 lines of usage on every rank.
    raise ConfigError(f"{message}; --help lists the flags")


def describe_device(args: Namespace, device: str) -> str:
    """Say in one line what Megatron's layers run on."""
    if device == "cuda":
        return describe(find_accelerators(), args)
    return (
        "topk_megatron: no CUDA device here; Megatron runs on the CPU "
        "(gloo, local modules, no fused kernels)"
    )
