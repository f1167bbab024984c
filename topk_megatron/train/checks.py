"""Checks that answer a wrong command line with one clear line.

Arguments and the files that they name are checked before Megatron builds a process group, so that
a mistake costs a second and not a place in the queue.
"""

from argparse import Namespace
from pathlib import Path

from topk_megatron.compat.accelerators import check_accelerators, find_accelerators
from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError, DataError
from topk_megatron.text.tokenizer import check_tokenizer_path
from topk_megatron.train.data_files import check_data_files


def check_arguments(args: Namespace, config: TopKConfig, device: str) -> None:
    """Refuse arguments that cannot work, before Megatron validates them.

    Raises:
        ConfigError: if a flag has to change; the message names it.
        DataError: if a file is missing or unsuitable.
    """
    check_settings(args, config)
    _check_world_size(args)
    _check_unsupported(args)
    if device == "cpu":
        _check_cpu(args)
    else:
        check_accelerators(args, find_accelerators())
    _check_files(args)


def check_settings(args: Namespace, config: TopKConfig) -> None:
    """Refuse arguments that contradict the TopK settings.

    This check runs before Megatron validates its arguments and again afterwards, because Megatron
    derives some arguments from others and takes some from a checkpoint.

    Raises:
        ConfigError: names the flag to change.
    """
    if args.topk_silent_tokens < 1:
        raise ConfigError(f"--topk-silent-tokens must be at least 1, got {args.topk_silent_tokens}")
    if args.cuda_graph_impl != "none" and config.layers:
        if config.anneal != "constant":
            raise ConfigError(
                "a CUDA graph would freeze k at the value at which it was captured; "
                "use --topk-anneal constant or --cuda-graph-impl none"
            )
        if args.topk_metrics:
            # The host decides which steps are measured and counts rows, and a replay does neither;
            # warm-up runs before a capture would be counted although no step has them.
            raise ConfigError(
                "replaying a CUDA graph does not gather the statistics of TopK layers; "
                "use --no-topk-metrics or --cuda-graph-impl none"
            )
    if args.cuda_graph_impl != "none" and config.mlp_layers:
        raise ConfigError(
            f"--topk-site {config.site} does not support CUDA graphs; use --cuda-graph-impl none"
        )
    if getattr(args, "inference_fuse_tp_communication", False) and config.residual_layers:
        raise ConfigError(
            "--inference-fuse-tp-communication computes the next layer's norm together with the "
            "residual add, before the TopK; drop the flag"
        )
    check_parallel(args, config)
    if config.layers and args.ckpt_format != "torch_dist" and (args.save or args.load):
        raise ConfigError(
            f"--ckpt-format {args.ckpt_format} does not store the TopK settings in a form that "
            "resuming can check; use torch_dist"
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
        "perform_rl_step": "--perform-rl-step: reinforcement learning has its own script in "
        "Megatron-LM (train_rl.py)",
        "logits_load_dir": "--logits-load-dir: distillation from cached logits is not supported",
        "hybrid_layer_pattern": "--hybrid-layer-pattern: only GPT models have TopK layers",
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
            "--context-parallel-size above 1 needs Transformer Engine's attention, which needs a "
            "CUDA device; set it to 1"
        )
    if args.cuda_graph_impl != "none":
        raise ConfigError(
            "--cuda-graph-impl needs a CUDA device and this machine has none; drop the flag"
        )
    if args.fp8 is not None:
        raise ConfigError(
            "--fp8-format needs a CUDA device and this machine has none; drop the flag"
        )


def _check_files(args: Namespace) -> None:
    for name in ("log_interval", "eval_interval"):
        if getattr(args, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    for name in ("save", "load"):
        path = getattr(args, name)
        if path is not None and Path(path).exists() and not Path(path).is_dir():
            raise ConfigError(f"--{name} {path} is a file; give a directory")
    if args.tokenizer_model is not None:
        check_tokenizer_path(args.tokenizer_type, args.tokenizer_model)
    if not args.sft:  # fine-tuning data are not .bin/.idx files
        check_data_files(args)
    sources = (args.data_path, args.train_data_path, args.data_args_path, args.mock_data)
    if not any(sources) and args.per_split_data_args_path is None:
        raise DataError("no training data: give --data-path PREFIX (or --mock-data)")


def check_parallel(args: Namespace, config: TopKConfig) -> None:
    """Refuse combinations that the sparse forms do not support.

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
        raise ConfigError(f"{flag} does not support CUDA graphs; use --cuda-graph-impl none")
    if args.overlap_moe_expert_parallel_comm:
        raise ConfigError(
            f"{flag} cannot be combined with --overlap-moe-expert-parallel-comm; drop one"
        )


def _check_transport(args: Namespace) -> None:
    flag = "--topk-sparse-p2p"
    if args.pipeline_model_parallel_size == 1:
        raise ConfigError(f"{flag} needs --pipeline-model-parallel-size above 1")
    refused = {
        "use_ring_exchange_p2p": "--use-ring-exchange-p2p",
        "variable_seq_lengths": "--variable-seq-lengths (message sizes must be known in advance)",
        "sft": "--sft (message sizes must be known in advance)",
        "mtp_num_layers": "--mtp-num-layers",
    }
    for name, words in refused.items():
        if getattr(args, name, None):
            raise ConfigError(f"{flag} cannot be combined with {words}; drop one")


def _check_saving(args: Namespace) -> None:
    flag = "--topk-sparse-save"
    if args.distribute_saved_activations:
        raise ConfigError(
            f"{flag} cannot be combined with --distribute-saved-activations; drop one"
        )
    for name in ("cpu_offloading", "fine_grained_activation_offloading"):
        if getattr(args, name, None):
            words = name.replace("_", "-")
            raise ConfigError(f"{flag} cannot be combined with --{words}; drop one")
    if args.gradient_accumulation_fusion and args.recompute_granularity != "full":
        raise ConfigError(
            f"{flag} without full recompute needs --no-gradient-accumulation-fusion: the fused "
            "layers read attributes of their weights, which saved-tensor hooks do not keep"
        )


def check_mlp(args: Namespace, config: TopKConfig) -> None:
    """Refuse MLP settings that do not fit the model, once Megatron has set its sizes.

    The widths of experts are checked when the model is built.

    Raises:
        ConfigError: says what to change.
    """
    from topk_megatron.model.mlp import check_fit

    if config.mlp_layers and args.num_experts is None:
        check_fit(config, args.ffn_hidden_size, args.tensor_model_parallel_size)
