"""One microbatch: fetch it, run the model and reduce the loss."""

import math
import os
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch import Tensor

from topk_megatron.errors import RunError
from topk_megatron.train.data import needs_batch, predicts_ahead

Batch = dict[str, Any]
# To a type checker Megatron's globals are Optional; they are set by the time a step runs.
mpu: Any = parallel_state

_TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_PACKING = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
# A loss this many times the largest one so far is reported (--check-for-spiky-loss).
_SPIKE = 10
# The losses of this step that `check_losses` has not read yet, on the device.
_unread: list[Tensor] = []


def forward_step(
    data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run one microbatch, as Megatron's `forward_step` does; `StepRunner` has opened the step.

    Returns:
        The model's output (losses [b, s] on the last stage) and the function that reduces it.
    """
    args: Any = get_args()
    timers: Any = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(args, data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packing = _packed_sequences(args, batch)
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    reduction = partial(reduce_loss, batch["loss_mask"])
    if return_schedule_plan:
        return model.build_schedule_plan(*inputs, **targets), reduction
    return model(*inputs, **targets, packed_seq_params=packing), reduction


def get_batch(args: Namespace, data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch:
    """Fetch this rank's share of a microbatch.

    Tensor-parallel rank 0 reads and sends to its group; context-parallel ranks take their part of
    the sequence. Entries that this stage does not need are None.

    Returns:
        A dictionary of ``tokens``, ``labels`` and ``position_ids``, int64 [b, s]; ``loss_mask``,
        float [b, s]; ``attention_mask``, bool [b, 1, s, s] or None; and the packing entries, None
        unless sequences are packed.
    """
    packed = args.sft or args.dataloader_inter_document_masking
    needed = needs_batch(args, vp_stage)
    names = (*_TENSORS, *_PACKING)
    if not needed and not packed:
        return dict.fromkeys(names)
    batch: Batch = {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        read = next(data_iterator)
        for name in names:
            value = read.get(name)
            batch[name] = value.cuda(non_blocking=True) if isinstance(value, Tensor) else value
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_ahead(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if needed:
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=args.hybrid_context_parallel,
            cp_group=mpu.get_context_parallel_group(),
            hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
            use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
        )
    return {name: batch.get(name) for name in names}


def _packed_sequences(args: Namespace, batch: Batch) -> PackedSeqParams | None:
    if batch["cu_seqlens"] is None:
        return None
    lengths: Any = batch["cu_seqlens"].squeeze(0)
    padded: Any = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(lengths)
    boundaries = lengths if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    size = None if batch["local_cp_size"] is None else int(batch["local_cp_size"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,  # pyright: ignore[reportArgumentType]
        cu_seqlens_kv_padded=padded,  # pyright: ignore[reportArgumentType]
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=size,  # pyright: ignore[reportArgumentType]
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=args.seq_length,
    )


def reduce_loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the per-token losses of a microbatch.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output: [b, s], negative log-likelihoods in nats.

    Returns:
        The loss summed over tokens, the number of tokens (int), and the entry that Megatron logs
        as ``lm loss``.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _validate_loss(loss)
    report = torch.cat([loss.detach().clone().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def _validate_loss(loss: Tensor) -> None:
    """Check a rank's own loss, before ranks average it.

    Under ``--rerun-mode disabled``, the default here, `check_losses` does it at the end of the
    step, so that microbatches do not wait for the device one after the other. In other modes
    Megatron checks at once, and first tries to find out whether the hardware is at fault.
    """
    args: Any = get_args()
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        if args.rerun_mode == "disabled":
            _unread.append(loss.detach())
        else:
            checks: Any = ((torch.isnan, "NaN"), (torch.isinf, "Inf"))
            for rejection, name in checks:
                machine.validate_result(
                    result=loss,
                    rejection_func=rejection,
                    message=f"found {name} in local forward loss calculation",
                    tolerance=0.0,
                    fatal=True,
                )
    if args.check_for_spiky_loss:
        spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        machine.validate_result(
            result=loss, rejection_func=spike, message="Spiky loss", tolerance=0.0, fatal=False
        )


def check_losses() -> None:
    """Read the losses of all microbatches of a step, which waits for the device once.

    Raises:
        RunError: if a loss is NaN or infinite.
    """
    if not _unread:
        return
    losses = torch.stack(_unread)
    _unread.clear()
    for loss in losses.tolist():
        _refuse_non_finite(loss, get_args())


def _refuse_non_finite(loss: float, args: Any) -> None:
    if math.isfinite(loss):
        return
    kind = "NaN" if math.isnan(loss) else "infinite"
    iteration = max(getattr(args, "curr_iteration", 0), args.iteration) + 1
    after = f"; --load {args.save} resumes from the last checkpoint" if args.save else ""
    raise RunError(
        f"iteration {iteration}: the loss of rank {args.rank} (node {os.uname().nodename}) is "
        f"{kind}; lower --lr, or skip this step with --iterations-to-skip {iteration}{after}"
    )
