"""The combinations that the sparse forms refuse, and their messages."""

from argparse import Namespace

import pytest

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.train.checks import check_parallel, check_settings

ACCEPTED = {
    "topk_sparse_p2p": True,
    "topk_sparse_save": True,
    "topk_verify": 10,
    "moe_grouped_gemm": False,
    "cuda_graph_impl": "none",
    "overlap_moe_expert_parallel_comm": False,
    "pipeline_model_parallel_size": 2,
    "distribute_saved_activations": False,
    "gradient_accumulation_fusion": False,
    "recompute_granularity": None,
}


def config(**changes: object) -> TopKConfig:
    settings = {"hidden_size": 64, "num_layers": 4, "k": 8, "layers": (0, 1)}
    return TopKConfig(**{**settings, **changes})  # pyright: ignore[reportArgumentType]


def test_supported_combinations_pass() -> None:
    check_parallel(Namespace(**ACCEPTED), config())
    fused = {"gradient_accumulation_fusion": True, "recompute_granularity": "full"}
    check_parallel(Namespace(**{**ACCEPTED, **fused}), config())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"topk_verify": 0}, "--topk-verify must be at least 1, got 0"),
        ({"topk_sparse_p2p": False, "topk_sparse_save": False}, "give one of them"),
        ({"pipeline_model_parallel_size": 1}, "needs --pipeline-model-parallel-size above 1"),
        ({"cuda_graph_impl": "local"}, "does not support CUDA graphs"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"use_ring_exchange_p2p": True}, "cannot be combined with --use-ring-exchange-p2p"),
        ({"variable_seq_lengths": True}, "cannot be combined with --variable-seq-lengths"),
        ({"sft": True}, "cannot be combined with --sft"),
        ({"mtp_num_layers": 1}, "cannot be combined with --mtp-num-layers"),
        ({"distribute_saved_activations": True}, "--distribute-saved-activations"),
        ({"cpu_offloading": True}, "cannot be combined with --cpu-offloading"),
        ({"gradient_accumulation_fusion": True}, "needs --no-gradient-accumulation-fusion"),
    ],
)
def test_unsupported_combinations_are_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_parallel(Namespace(**{**ACCEPTED, **changes}), config())


@pytest.mark.parametrize("changes", [{"layers": ()}, {"site": "mlp", "mlp_k": 8}])
def test_a_dense_residual_stream_has_nothing_to_send_or_save(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="needs layers with a TopK on the residual stream"):
        check_parallel(Namespace(**ACCEPTED), config(**changes))


def test_grouped_experts_cannot_have_a_topk_inside() -> None:
    args = {**ACCEPTED, "moe_grouped_gemm": True}
    with pytest.raises(ConfigError, match="cannot enter grouped experts"):
        check_parallel(Namespace(**args), config(site="both", mlp_k=8))


def settings(**changes: object) -> Namespace:
    """Arguments of a run that `check_settings` accepts, with changes."""
    rest = {
        "topk_silent_tokens": 1,
        "topk_metrics": True,
        "ckpt_format": "torch_dist",
        "save": None,
        "load": None,
        "topk_sparse_p2p": False,
        "topk_sparse_save": False,
        "topk_verify": None,
    }
    return Namespace(**{**ACCEPTED, **rest, **changes})


def test_the_overlapped_schedule_of_experts_is_accepted() -> None:
    """Its layers have their TopK (tests/distributed/test_bypass.py)."""
    check_settings(settings(overlap_moe_expert_parallel_comm=True), config())


def test_a_fused_add_that_leaves_the_topk_out_is_refused() -> None:
    args = settings(inference_fuse_tp_communication=True)
    with pytest.raises(ConfigError, match="--inference-fuse-tp-communication"):
        check_settings(args, config())
    check_settings(args, config(layers=()))
