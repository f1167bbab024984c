"""The combinations that the sparse forms refuse, and their messages."""

from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core.transformer.enums import AttnBackend

from topk_megatron.config import TopKConfig
from topk_megatron.errors import ConfigError
from topk_megatron.train.checks import (
    _check_cpu,
    check_attention,
    check_parallel,
    check_settings,
)
from topk_megatron.train.interruptions import guarded_save

ACCEPTED = {
    "topk_sparse_p2p": True,
    "topk_sparse_save": True,
    "topk_verify": 10,
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


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_cuda_graph_would_keep_the_k_of_its_capture(impl: str) -> None:
    annealed = config(anneal="cosine", anneal_start_k=64, anneal_end=10)
    args = settings(cuda_graph_impl=impl, topk_metrics=False)
    with pytest.raises(ConfigError) as refusal:
        check_settings(args, annealed)
    for words in (
        f"--topk-anneal cosine cannot be combined with --cuda-graph-impl {impl}",
        "every replay of a CUDA graph would keep the k of its capture",
        "use --topk-anneal constant or --cuda-graph-impl none",
    ):
        assert words in str(refusal.value)
    check_settings(args, config())
    check_settings(settings(), annealed)


def test_formats_that_keep_the_settings_pass() -> None:
    for ckpt_format in ("torch_dist", "fsdp_dtensor"):
        check_settings(settings(ckpt_format=ckpt_format, save="x"), config())
    args = settings(ckpt_format="torch", save="x")
    with pytest.raises(ConfigError, match=r"--ckpt-format torch does not store .* fsdp_dtensor"):
        check_settings(args, config())


def test_without_a_gpu_megatron_fsdp_is_refused() -> None:
    args = {"transformer_impl": "local", "context_parallel_size": 1, "cuda_graph_impl": "none"}
    _check_cpu(Namespace(**args, fp8=None, use_megatron_fsdp=False))
    with pytest.raises(ConfigError, match=r"--use-megatron-fsdp needs a CUDA device"):
        _check_cpu(Namespace(**args, fp8=None, use_megatron_fsdp=True))


def test_a_checkpoint_of_megatron_fsdp_loses_its_index_before_it_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "iter_0000003" / ".metadata"
    index.parent.mkdir()
    args = Namespace(ckpt_format="fsdp_dtensor", rank=0, save=str(tmp_path))
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    seen: list[bool] = []

    def save(iteration: int, *, non_persistent_ckpt: bool) -> None:
        seen.append(index.exists())

    for ckpt_format, rank, elsewhere, there in (
        ("fsdp_dtensor", 0, False, False),
        ("fsdp_dtensor", 1, False, True),
        ("fsdp_dtensor", 0, True, True),  # this save overwrites nothing of --save
        ("torch_dist", 0, False, True),
    ):
        args.ckpt_format, args.rank = ckpt_format, rank
        index.touch()
        guarded_save(save, 3, non_persistent_ckpt=elsewhere)
        assert seen.pop() is there


def test_the_overlapped_schedule_of_experts_is_accepted() -> None:
    """Its layers have their TopK (tests/distributed/test_bypass.py)."""
    check_settings(settings(overlap_moe_expert_parallel_comm=True), config())


def test_a_fused_add_that_leaves_the_topk_out_is_refused() -> None:
    args = settings(inference_fuse_tp_communication=True)
    with pytest.raises(ConfigError, match="--inference-fuse-tp-communication"):
        check_settings(args, config())
    check_settings(args, config(layers=()))


@pytest.mark.parametrize("packing", ["sft", "dataloader_inter_document_masking"])
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"attention_backend": AttnBackend.unfused}, "--attention-backend unfused calls for it"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable calls for it"),
        ({"mtp_num_layers": 1}, "the layers of --mtp-num-layers cannot read"),
        ({"transformer_impl": "transformer_engine", "mtp_num_layers": 1}, None),
    ],
)
def test_packed_sequences_need_an_attention_that_reads_them(
    changes: dict[str, object], complaint: str | None, packing: str
) -> None:
    settings = {
        "transformer_impl": "local",
        "attention_backend": AttnBackend.auto,
        "softmax_type": "vanilla",
        "multi_latent_attention": False,
        "experimental_attention_variant": None,
        "batch_invariant_mode": False,
        "mtp_num_layers": None,
        "sft": False,
        "dataloader_inter_document_masking": False,
        **changes,
    }
    check_attention(Namespace(**settings))
    settings[packing] = True
    if complaint is None:
        check_attention(Namespace(**settings))
    else:
        with pytest.raises(ConfigError, match=complaint) as e:
            check_attention(Namespace(**settings))
        assert str(e.value).startswith(f"--{packing.replace('_', '-')} ")


def test_latent_attention_is_refused_where_megatron_fails_to_build_it() -> None:
    args = Namespace(transformer_impl="local", multi_latent_attention=True)
    with pytest.raises(ConfigError, match="--multi-latent-attention needs Transformer Engine"):
        check_attention(args)
