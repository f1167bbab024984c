#!/usr/bin/env bash
# Measures and checks the project on one GPU, and writes tables: docs/gpu_check.md explains it.
#
#     scripts/gpu_check.sh [options] [RESULTS]          (default: runs/gpu_check/DATE)
#
#     --minutes N      how long everything may take, 3 or more (default: 8)
#     --bundle DIR     what scripts/gpu_bundle.py built: wheels, kernel libraries, text
#     --corpus DIR     folder with text.bin, text.idx and tokenizer.model (default: the bundle's)
#     --te DIR         folder in which Python finds Transformer Engine; adds a step
#     --only A,B       run these steps only
#     --copy-to DIR    also put the tables and results.tar.gz there (five files)
#     --dry-run        check that every step could start, print the plan, run nothing
#
# Every step has its own time limit and log. A step that fails or runs out of time does not stop the
# others; the status at the end is 1 if one did. No clock or other setting of the card is changed.
set -uo pipefail
here=$PWD
repo=$(cd "$(dirname "$0")/.." && pwd)
cd "$repo" || exit 2
export GPU_CHECK_COMMAND="scripts/gpu_check.sh $*"

die() { printf 'error: %s\n' "$*" >&2; exit 2; }
help="see the head of scripts/gpu_check.sh"

minutes=8 bundle='' corpus='' te='' only='' copy_to='' results='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
        --minutes | --bundle | --corpus | --te | --only | --copy-to)
            [ $# -ge 2 ] || die "$1 needs a value; $help"
            name=${1#--}
            printf -v "${name//-/_}" '%s' "$2"
            shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "scripts/${0##*/}"; exit 0 ;;
        -*) die "unknown option $1; $help" ;;
        *) [ -z "$results" ] || die "one folder for results, got $results and $1"
           results=$1; shift ;;
    esac
done
[[ $minutes =~ ^[0-9]+$ ]] && [ "$minutes" -ge 3 ] || die "--minutes must be 3 or more, got $minutes"
results=${results:-$repo/runs/gpu_check/$(date -u +%Y-%m-%d)}
for name in bundle corpus te copy_to results; do # relative paths are the caller's
    [ -z "${!name}" ] || [[ ${!name} == /* ]] || printf -v "$name" '%s/%s' "$here" "${!name}"
done
for folder in "$bundle" "$corpus" "$te"; do
    [ -z "$folder" ] || [ -d "$folder" ] || die "$folder is not a folder"
done
if [ -z "$corpus" ] && [ -n "$bundle" ] && [ -d "$bundle/corpus" ]; then corpus=$bundle/corpus; fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$repo/.venv/bin/python" || echo python3)}
site=$repo/build/gpu_site
unpack_wheels() {
    export PYTHONPATH="$repo${bundle:+:$site}${te:+:$te}${PYTHONPATH:+:$PYTHONPATH}"
    [ -z "$bundle" ] || "$python" scripts/gpu_bundle.py --unpack "$bundle" --site "$site"
}
[ -z "$bundle" ] || [ ! -f "$bundle/kernels/libcccl_topk.so" ] ||
    export TOPK_CCCL_LIBRARY="$bundle/kernels/libcccl_topk.so"
# What the commands of the steps use.
export python bundle site corpus out=$results PYTHONUNBUFFERED=1

# Each step: its name, its share of the time, a tool that it needs, and its command. The shares are
# seconds of about 520 and are scaled to --minutes. A program is told $seconds, less than its limit,
# because it has to import torch first and to write its results. The first import on a fresh machine
# is slow, hence the first step's share. The last step gets the time that the others left.
sanitizer='compute-sanitizer --error-exitcode 9 --tool'
launches='"$python" -m benchmarks.gpu.launches every'
tests='"$python" -m pytest -q -p no:cacheprovider'
steps=(
    'machine|40|-|"$python" -m benchmarks.gpu.machine --output "$out/machine.json" --command "$GPU_CHECK_COMMAND"'
    'library|45|-|prepare_library'
    "kernels|45|-|$tests -m 'not distributed' tests/gpu"
    'oracle|45|-|"$python" -m tests.gpu.oracle --seconds "$seconds" --output "$out/oracle.json"'
    "memcheck|35|compute-sanitizer|PYTORCH_NO_CUDA_MEMORY_CACHING=1 $sanitizer memcheck $launches"
    "racecheck|30|compute-sanitizer|$sanitizer racecheck $launches --quick"
    "initcheck|20|compute-sanitizer|PYTORCH_NO_CUDA_MEMORY_CACHING=1 $sanitizer initcheck $launches --quick"
    'operator|70|-|"$python" benchmarks/topk_mask.py --device cuda --hidden 4096 1024 2048 8192 16384 --seconds "$seconds" --output "$out/operator.json"'
    'counters|35|ncu|"$python" -m benchmarks.gpu.counters --output "$out/counters.json" --raw "$out/ncu.txt"'
    'transport|20|-|"$python" -m benchmarks.gpu.transport --output "$out/transport.json"'
    'train_step|55|-|"$python" -m benchmarks.gpu.train_step --seconds "$seconds" --output "$out/train_step.json"'
    'pretrain|40|-|"$python" -m benchmarks.gpu.pretrain slice --seconds "$seconds" --output "$out/pretrain.json"'
)
[ -z "$te" ] || steps+=(
    "transformer_engine|60|-|$tests tests/gpu/test_training.py -k 'transformer_engine or fp8'"
)
steps+=(
    'training|35|-|"$python" -m benchmarks.gpu.pretrain corpus --corpus "$corpus" --seconds "$seconds" --output "$out/training.json"'
)
shares=5 # for the tables
for step in "${steps[@]}"; do IFS='|' read -r _ share _ <<<"$step"; shares=$((shares + share)); done
total=$((minutes * 60))
bound_of() { echo $(($1 * total / shares)); }

wanted() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }
names=" $(for step in "${steps[@]}"; do printf '%s ' "${step%%|*}"; done)"
for name in ${only//,/ }; do
    [[ $names == *" $name "* ]] || die "--only has no step $name; the steps are:$names"
done

# Why a step cannot run here, or nothing.
obstacle() {
    local name=$1 tool=$2
    if [ "$tool" != - ] && ! command -v "$tool" >/dev/null; then
        echo "$tool is not on this machine"
    elif [ "$name" = training ] && [ ! -f "$corpus/text.bin" ]; then
        echo "no text: give --bundle or --corpus"
    fi
}

# Installs the bundle's libraries, and builds the CUDA library if there is none to load.
prepare_library() {
    if [ -n "$bundle" ]; then
        "$python" scripts/gpu_bundle.py --install "$bundle" || return 1
    fi
    local probe='from topk_megatron.ops.extension import MISSING; import sys; print(MISSING["cuda"] or "the CUDA library loads"); sys.exit(MISSING["cuda"] is not None)'
    "$python" -c "$probe" && return 0
    echo "building the libraries with nvcc"
    TOPK_MEGATRON_BUILD_CUDA=force TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
        "$python" setup.py -q build_ext --inplace && "$python" -c "$probe"
}
export -f prepare_library

record() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$results/steps.tsv"; }

run_step() {
    local name share tool words bound left began status
    IFS='|' read -r name share tool words <<<"$1"
    wanted "$name" || return 0
    local why; why=$(obstacle "$name" "$tool")
    left=$((deadline - SECONDS - $(bound_of 5)))
    bound=$(bound_of "$share")
    [ "$name" = training ] && bound=$left
    [ "$bound" -le "$left" ] || bound=$left
    if [ -n "$why" ]; then
        printf '%s\n' "$why" >"$results/$name.log"
        record "$name" "skipped: $why" 0 "$bound"
        return 0
    fi
    if [ "$bound" -lt 3 ]; then
        record "$name" "skipped: no time left" 0 "$bound"
        return 0
    fi
    printf '== %s (at most %s s)\n' "$name" "$bound"
    began=$SECONDS
    seconds=$((bound > 22 ? bound - 12 : bound / 2)) \
        timeout --kill-after=5 "$bound" bash -c "$words" >"$results/$name.log" 2>&1 </dev/null
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="stopped at its limit" ;;
        *) status="failed ($status)" ;;
    esac
    record "$name" "$status" "$((SECONDS - began))" "$bound"
    [ "$status" = ok ] || failed=1
    tail -n 1 "$results/$name.log" | cut -c1-200
}

dry_run() {
    local problems=0 sum step name share tool words why
    local modules="benchmarks.gpu.machine benchmarks.gpu.launches benchmarks.gpu.counters
        benchmarks.gpu.transport benchmarks.gpu.train_step benchmarks.gpu.pretrain
        benchmarks.gpu.tables tests.gpu.oracle"
    echo "python: $("$python" --version 2>&1) at $python"
    for name in $modules; do
        "$python" -m "$name" --help >/dev/null 2>"$scratch/error" ||
            { echo "PROBLEM: $name does not start: $(tail -n 1 "$scratch/error")"; problems=1; }
    done
    for name in benchmarks/topk_mask.py pretrain_topk_gpt.py scripts/gpu_bundle.py; do
        "$python" "$name" --help >/dev/null 2>"$scratch/error" ||
            { echo "PROBLEM: $name does not start: $(tail -n 1 "$scratch/error")"; problems=1; }
    done
    "$python" -m pytest --collect-only -q -p no:cacheprovider tests/gpu >"$scratch/error" 2>&1 ||
        { echo "PROBLEM: tests/gpu cannot be collected: $(tail -n 1 "$scratch/error")"; problems=1; }
    if [ -n "$bundle" ]; then
        "$python" scripts/gpu_bundle.py --check "$bundle" || problems=1
    fi
    for name in nvidia-smi nvcc ncu compute-sanitizer; do
        command -v "$name" >/dev/null || echo "not on this machine: $name"
    done
    sum=$(bound_of 5)
    printf '\n%-20s %8s  %s\n' step "at most" remark
    for step in "${steps[@]}"; do
        IFS='|' read -r name share tool words <<<"$step"
        wanted "$name" || continue
        why=$(obstacle "$name" "$tool")
        sum=$((sum + $(bound_of "$share")))
        printf '%-20s %6s s  %s\n' "$name" "$(bound_of "$share")" "${why:+skipped: $why}"
    done
    printf '%-20s %6s s\n' tables "$(bound_of 5)"
    printf '%-20s %6s s  of %s\n' "all together" "$sum" "$total"
    [ "$sum" -le "$total" ] || { echo "PROBLEM: that is more than --minutes $minutes"; problems=1; }
    return "$problems"
}

pack() {
    local packed=$results.tar.gz # beside the folder, which must not change while it is read
    rm -f "$results/results.tar.gz"
    tar -C "$results" --exclude=index-cache -czf "$packed" . || return 1
    mv "$packed" "$results/results.tar.gz"
    [ -z "$copy_to" ] || cp -f -- "$results"/*.md "$results/results.tar.gz" "$copy_to/"
}

if [ -n "$dry_run" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    site=$scratch/site # the programs import what the bundle brings; nothing else is written
    unpack_wheels || exit 1
    dry_run
    exit $?
fi

mkdir -p "$results" ${copy_to:+"$copy_to"} || die "cannot write to $results"
rm -f "$results"/steps.tsv "$results"/*.json "$results"/*.log "$results"/*.csv "$results"/*.md
unpack_wheels || echo "going on without the bundle's wheels"
SECONDS=0 deadline=$total failed=''
for step in "${steps[@]}"; do run_step "$step"; done
"$python" -m benchmarks.gpu.tables "$results" || failed=1
pack || failed=1
printf 'results: %s (all in results.tar.gz), %s s\n' "$results" "$SECONDS"
[ -z "$failed" ]
