"""Megatron's own pretraining datasets, configured from its own flags."""

import json
from argparse import Namespace
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

# Maps each dataset setting to the Megatron argument that it comes from.
_SETTINGS = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "split": "split",
    "multiple_validation_sets": "multiple_validation_sets",
    "full_validation": "full_validation",
    "num_dataset_builder_threads": "num_dataset_builder_threads",
    "path_to_cache": "data_cache_path",
    "mmap_bin_files": "mmap_bin_files",
    "reset_position_ids": "reset_position_ids",
    "reset_attention_mask": "reset_attention_mask",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "object_storage_cache_path": "object_storage_cache_path",
    "mid_level_dataset_surplus": "mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens": "allow_ambiguous_pad_tokens",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "context_parallel_size": "context_parallel_size",
    "data_parallel_size": "data_parallel_size",
    "hybrid_context_parallel": "hybrid_context_parallel",
    "inter_document_masking": "dataloader_inter_document_masking",
}
_FIM_SETTINGS = (
    "fim_rate",
    "fim_spm_rate",
    "fim_split_sample",
    "fim_fragment_rate",
    "fim_no_prefix",
)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the train, validation and test datasets.

    Args:
        num_samples: number of samples wanted for train, validation and test.
        vp_stage: virtual pipeline stage, under interleaved pipelining.

    Returns:
        The three datasets, each None on ranks that read no data.
    """
    args: Any = get_args()
    print_rank_0("> building train, validation, and test datasets ...")
    return BlendedMegatronDatasetBuilder(
        _dataset_class(args), num_samples, partial(_reads_data, args, vp_stage), _config(args)
    ).build()


# By Megatron's contract, every rank calls the provider and the builder decides which ranks read.
datasets_provider.is_distributed = True  # pyright: ignore[reportFunctionMemberAccess]


def needs_batch(args: Namespace, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage embeds tokens or computes a loss."""
    return is_first_or_last_pipeline_stage(vp_stage) or predicts_ahead(args, vp_stage)


def predicts_ahead(args: Namespace, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage has layers of multi-token prediction."""
    if not args.mtp_num_layers:
        return False
    config: Any = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _reads_data(args: Namespace, vp_stage: int | None) -> bool:
    # Ranks of one tensor-parallel group get their batch from its first rank.
    return mpu.get_tensor_model_parallel_rank() == 0 and (args.sft or needs_batch(args, vp_stage))


def _dataset_class(args: Namespace) -> type:
    if args.sft:
        return SFTDataset
    if args.mock_data:
        return MockGPTDataset
    return GPTFIMDataset if args.fim_data else GPTDataset


def _config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    settings = {name: getattr(args, argument) for name, argument in _SETTINGS.items()}
    settings["blend"] = blend
    settings["blend_per_split"] = blend_per_split
    settings["tokenizer"] = build_tokenizer(args)
    settings["sequence_parallel_size"] = args.tensor_model_parallel_size * args.sequence_parallel
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            settings["sequences_per_dataset"] = json.load(file)
    if not args.fim_data:
        return GPTDatasetConfig(**settings)
    settings.update({name: getattr(args, name) for name in _FIM_SETTINGS})
    names = ("prefix", "middle", "suffix", "pad", "eod")
    settings["fim_extra_tokens"] = {name: getattr(args, f"fim_{name}_token") for name in names}
    return GPTFIMDatasetConfig(**settings)
