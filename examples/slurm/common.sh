# Functions that the sbatch scripts share; they source this file.
# shellcheck shell=bash

# Print the flags in an argument file as words, without comments.
flags_of() { sed 's/#.*//' "$1" | tr -s '[:space:]' ' '; }

# Print a node's address as Slurm knows it, which is not always its name.
address_of() { scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1; }

# Run the given srun command. A run that was asked to stop and has saved returns to the queue.
#
# The meeting point is computed from the node list of this start, and its name contains the number
# of restarts: a requeued job may get other nodes, and a straggler from its previous life must not
# join it.
train_with_slurm() {
    local first code=0
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export RDZV_ID="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    RDZV_ENDPOINT="$(address_of "$first"):$((20000 + SLURM_JOB_ID % 10000))"
    export RDZV_ENDPOINT
    echo "== job $RDZV_ID on $SLURM_JOB_NODELIST, meeting at $RDZV_ENDPOINT"
    # Slurm's signals are for the ranks; this shell waits until they have saved.
    trap 'echo "== asked to stop; waiting for the ranks to save"' TERM
    "$@" || code=$?
    echo "== job $RDZV_ID ended with $code"
    if [ "$code" = 75 ] && ! scontrol show config | grep -q 'RequeueExit *=.*\b75\b'; then
        scontrol requeue "$SLURM_JOB_ID" # ends this script too
        sleep 60
    fi
    return "$code"
}
