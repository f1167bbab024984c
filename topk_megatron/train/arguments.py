"""The ``--topk-…`` flags, and the checks that turn a wrong command into one clear line.

Everything that can be known from the arguments and the files they name is checked before Megatron
builds a process group, so that a mistake costs a second and not a place in the queue.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NoReturn, get_args

from topk_megatron.compat.accelerators import (
    check_accelerators,
    describe,
    find_accelerators,
    gpu_defaults,
)
from topk_megatron.compat.patches import mend_help
from topk_megatron.config import (
    DEFAULT_HIDDEN_PER_K,
    DEFAULT_LAYERS,
    Anneal,
    Mode,
    Site,
    TopKConfig,
)
from topk_megatron.errors import ConfigError, DataError
from topk_megatron.text.tokenizer import check_tokenizer_path
from topk_megatron.train.arguments_parallel import add_parallel_arguments, check_parallel
from topk_megatron.train.data_files import check_data_files

# What Megatron's defaults must become where there is no CUDA: gloo for NCCL, Megatron's own
# modules for Transformer Engine's, and no kernel that exists for GPUs only.
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
    """Megatron's `extra_args_provider` with our flags."""
    group = parser.add_argument_group(
        "topk", "TopK language model: hidden states that keep their k largest neurons."
    )
    group.add_argument(
        "--topk-k",
        type=int,
        metavar="K",
        help="neurons that survive at each TopK layer, of --hidden-size; the hidden size itself is "
        f"the dense model (default: hidden size / {DEFAULT_HIDDEN_PER_K})",
    )
    group.add_argument(
        "--topk-layers",
        metavar="LAYERS",
        help="layers with a TopK, counted from 0: 0-9 or 0,2,5 or all or all,-2 (all but the last "
        f"two) or none (the dense model) (default: {DEFAULT_LAYERS})",
    )
    group.add_argument(
        "--topk-mode",
        choices=get_args(Mode),
        help="keep the largest values or the largest magnitudes (default: value)",
    )
    group.add_argument(
        "--topk-anneal",
        choices=get_args(Anneal),
        help="how k goes from its start to --topk-k; exponential is linear in log k "
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
        help="iteration from which k is --topk-k (default: half of the way from "
        "--topk-anneal-begin to --train-iters)",
    )
    group.add_argument(
        "--topk-site",
        choices=get_args(Site),
        help="where the layers of --topk-layers have their TopK: on the residual stream after the "
        "layer, on the activation inside the MLP, or both (default: residual)",
    )
    group.add_argument(
        "--topk-mlp-k",
        type=int,
        metavar="K",
        help="units of the MLP's activation that survive, of --ffn-hidden-size; required by "
        "--topk-site mlp and both",
    )
    group.add_argument(
        "--topk-mlp-groups",
        type=int,
        metavar="G",
        help="select K / G units in each of G equal groups of the ffn dimension, without "
        "communication when the tensor-parallel size divides G (default: the K largest of all, "
        "over all tensor-parallel ranks)",
    )
    group.add_argument(
        "--topk-override",
        action="store_true",
        help="resume although the checkpoint was made with other TopK settings",
    )
    group.add_argument(
        "--topk-trust-checkpoint",
        action="store_true",
        help="let Megatron open a checkpoint that holds objects of classes that no checkpoint "
        "needs; such an object can run code",
    )
    group.add_argument(
        "--topk-silent-tokens",
        type=int,
        default=100_000,
        metavar="TOKENS",
        help="a neuron is silent when it was zero for this many tokens (default: %(default)s)",
    )
    group.add_argument(
        "--no-topk-metrics",
        action="store_false",
        dest="topk_metrics",
        help="do not gather or log density, kept norm and silent neurons of TopK layers",
    )
    add_parallel_arguments(group)
    return parser


def arguments_provider(device: str, defaults: dict[str, Any] | None = None) -> Any:
    """The parser hook for this device, with Megatron's defaults changed to what is here."""

    def provider(parser: ArgumentParser) -> ArgumentParser:
        add_topk_arguments(parser)
        mend_help(parser)
        parser.error = _raise_usage  # pyright: ignore[reportAttributeAccessIssue]
        # Megatron 0.19 divides by this flag and has no default for it.
        parser.set_defaults(eval_interval=1000)
        # A run that is asked to stop saves first; a loss that is no number stops it in that very
        # step. Megatron's search for the hardware's part in it (--rerun-mode validate_results) is
        # experimental and lets the first step pass.
        parser.set_defaults(exit_signal_handler=True, rerun_mode="disabled")
        missing = CPU_DEFAULTS if device == "cpu" else gpu_defaults(find_accelerators())
        parser.set_defaults(**missing)
        parser.set_defaults(**(defaults or {}))
        return parser

    return provider


def _raise_usage(message: str) -> NoReturn:
    # argparse would print Megatron's 700 lines of usage, once a rank.
    raise ConfigError(f"{message}; --help lists the flags")


def check_arguments(args: Namespace, device: str) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError, DataError: one line that says what to change.
    """
    _check_topk(args)
    _check_world_size(args)
    _check_unsupported(args)
    if device == "cpu":
        _check_cpu(args)
    else:
        check_accelerators(args, find_accelerators())
    _check_files(args)


def _check_topk(args: Namespace) -> None:
    if args.use_checkpoint_args and (args.hidden_size is None or args.num_layers is None):
        return  # the sizes come from the checkpoint; TopKConfig is built again after it is read
    for name in ("hidden_size", "num_layers"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is required")
    check_settings(args, TopKConfig.from_args(args))


def check_settings(args: Namespace, config: TopKConfig) -> None:
    """Refuse what these TopK settings do not go with; asked again with a checkpoint's settings.

    Raises:
        ConfigError: names the flag to change.
    """
    if args.topk_silent_tokens < 1:
        raise ConfigError(f"--topk-silent-tokens must be at least 1, got {args.topk_silent_tokens}")
    if args.cuda_graph_impl != "none" and config.layers:
        if config.anneal != "constant":
            raise ConfigError(
                "a CUDA graph would freeze k at the value it was captured with; "
                "use --topk-anneal constant or --cuda-graph-impl none"
            )
        if args.topk_metrics:
            raise ConfigError(
                "statistics of TopK layers are not gathered when a CUDA graph is replayed; "
                "use --no-topk-metrics or --cuda-graph-impl none"
            )
    if args.cuda_graph_impl != "none" and config.mlp_layers:
        raise ConfigError(
            f"--topk-site {config.site} is not made for CUDA graphs; use --cuda-graph-impl none"
        )
    check_parallel(args, config)
    if config.layers and args.ckpt_format != "torch_dist" and (args.save or args.load):
        raise ConfigError(
            f"--ckpt-format {args.ckpt_format} does not carry the TopK settings in a way that is "
            "checked on resuming; use torch_dist"
        )


def _check_world_size(args: Namespace) -> None:
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    model_size = 1
    for size in sizes.values():
        model_size *= size
    if model_size < 1 or args.world_size % model_size:
        product = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size != 1)
        raise ConfigError(
            f"{args.world_size} ranks cannot be divided by {product} = {model_size}; "
            "change torchrun's --nproc-per-node and --nnodes or the sizes"
        )


def _check_unsupported(args: Namespace) -> None:
    refused = {
        "perform_rl_step": "--perform-rl-step: reinforcement learning has a script of its own in "
        "Megatron-LM (train_rl.py)",
        "logits_load_dir": "--logits-load-dir: distillation from cached logits is not supported",
        "hybrid_layer_pattern": "--hybrid-layer-pattern: TopK layers exist for GPT models only",
        "yaml_cfg": "--yaml-cfg: give the settings as flags",
    }
    for name, message in refused.items():
        if getattr(args, name, None):
            raise ConfigError(f"{message}; drop the flag")


def _check_cpu(args: Namespace) -> None:
    if args.transformer_impl != "local":
        raise ConfigError(
            f"--transformer-impl {args.transformer_impl} needs a CUDA device and this machine has "
            "none; drop the flag to use Megatron's local modules"
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            "--context-parallel-size above 1 needs Transformer Engine's attention, and that a CUDA "
            "device; set it to 1"
        )
    if args.cuda_graph_impl != "none":
        raise ConfigError("--cuda-graph-impl needs a CUDA device and this machine has none")
    if args.fp8 is not None:
        raise ConfigError("--fp8-format needs a CUDA device and this machine has none; drop it")


def _check_files(args: Namespace) -> None:
    for name in ("log_interval", "eval_interval"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("save", "load"):
        path = getattr(args, name)
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ConfigError(f"--{name} {path} is a file; give a directory")
    if args.tokenizer_model is not None:
        check_tokenizer_path(args.tokenizer_type, args.tokenizer_model)
    if not args.sft:  # whose data are not .bin/.idx
        check_data_files(args)
    sources = (args.data_path, args.train_data_path, args.data_args_path, args.mock_data)
    if not any(sources) and args.per_split_data_args_path is None:
        raise DataError("no training data: give --data-path PREFIX (or --mock-data)")


def describe_device(args: Namespace, device: str) -> str:
    """The one line that says what Megatron's layers run on."""
    if device == "cuda":
        return describe(find_accelerators(), args)
    return (
        "topk_megatron: no CUDA device here; Megatron runs on the CPU "
        "(gloo, local modules, no fused kernels)"
    )
