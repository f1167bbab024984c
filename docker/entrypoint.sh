#!/bin/sh
# Flags start the launcher (torchrun that reports to a scheduler how a run ended); a program runs
# unchanged.
#
#     docker run … topk-megatron --standalone --nproc-per-node 8 pretrain_topk_gpt.py …
#     docker run … topk-megatron python tools/convert_checkpoint.py to-hf …
set -eu
case "${1:-}" in
-*) exec python -m topk_megatron.train.launch "$@" ;;
"") exec python -m topk_megatron.train.launch --help ;;
*) exec "$@" ;;
esac
