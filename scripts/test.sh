#!/usr/bin/env bash
# Runs the tests on the CPU and then, if this machine has an NVIDIA GPU, tests/gpu on the GPU.
#
#     scripts/test.sh [options and paths of pytest]
#
# tests/conftest.py hides GPUs from every run that is not about tests/gpu alone: the rest of the suite
# trains with several ranks, which one GPU could not serve. WORKERS is the number of test files that run
# at the same time on the CPU (default 2); tests of a GPU run one after the other.
set -uo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; }

# Paths limit both runs: without any, everything is asked for.
paths=() gpu_paths=() options=()
for word in "$@"; do
    case "$word" in
    tests/gpu | tests/gpu/*) gpu_paths+=("$word") ;;
    tests | tests/ | ./tests) ;;
    tests/*) paths+=("$word") ;;
    *) options+=("$word") ;;
    esac
done
everything=$((${#paths[@]} + ${#gpu_paths[@]} == 0))

code=0
if ! has_gpu; then
    "$python" -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
    exit
fi
if ((everything || ${#paths[@]})); then
    "$python" -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile --ignore tests/gpu \
        ${options[@]+"${options[@]}"} ${paths[@]+"${paths[@]}"} || code=$?
fi
if ((everything)); then gpu_paths=(tests/gpu); fi
if ((${#gpu_paths[@]})); then
    "$python" -m pytest ${options[@]+"${options[@]}"} "${gpu_paths[@]}"
    gpu=$?
    # 5: no test matches the options, which may well be meant for the rest.
    if ((gpu != 0 && !(gpu == 5 && everything))); then code=$gpu; fi
fi
exit "$code"
