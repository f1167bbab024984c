#!/usr/bin/env bash
# srun starts this once on every node: it runs the launcher with the pretraining flags.
set -euo pipefail
. "$PROJECT/examples/slurm/common.sh"

cd "$PROJECT"
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A hanging collective ends the rank, so that the launcher can restart the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Exactly one node keeps the list of nodes that have arrived. We name it, because torchrun would guess
# it from host names, which fails where a node has several.
is_host=$([ "$SLURM_PROCID" = 0 ] && echo 1 || echo 0)
exec "$PYTHON" -m topk_megatron.train.launch \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "$RDZV_ENDPOINT" \
    --rdzv-conf "is_host=$is_host,join_timeout=900" \
    --local-addr "${NODE_ADDRESS:-$(address_of "$SLURMD_NODENAME")}" \
    "${ENTRY:-pretrain_topk_gpt.py}" "$@"
