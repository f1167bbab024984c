#!/usr/bin/env bash
# Sets up .venv: finds or fetches Python 3.12 or newer, installs the pinned dependencies and builds the
# extension. Does nothing if everything is in place. Set PYTHON to choose an interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/setup.log
say() { printf 'setup: %s\n' "$*"; }

# A candidate counts only if it runs, is new enough and can make a virtual environment: version
# managers put shims on PATH that fail when they are called.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate version
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python; do
        if usable "$candidate"; then command -v "$candidate"; return; fi
    done
    if command -v pyenv >/dev/null 2>&1; then
        for version in $(pyenv versions --bare --skip-aliases 2>/dev/null | sort -V); do
            candidate=$(pyenv prefix "$version" 2>/dev/null)/bin/python3
            if usable "$candidate"; then printf '%s\n' "$candidate"; return; fi
        done
    fi
    return 1
}

make_venv() {
    local python
    rm -rf "$venv"
    if python=$(find_python); then
        say "creating $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    elif command -v uv >/dev/null 2>&1; then
        say "no Python 3.12 or newer found; asking uv for one"
        uv venv --quiet --python 3.12 --seed "$venv"
    else
        say "error: Python 3.12 or newer is needed (megatron-core requires it) and none was found" >&2
        say "on PATH or in pyenv, and there is no uv to fetch one. Install one of the three, or" >&2
        say "set PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
}

run_logged() {
    if ! "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        say "error: '$*' failed; the whole output is in $log" >&2
        exit 1
    fi
}

stamp_of() { cat "$@" | cksum | tr ' ' '-'; }

usable "$venv/bin/python" || make_venv
packages=$(stamp_of pyproject.toml constraints.txt constraints-transformers-4.txt)
sources=$(stamp_of setup.py $(git ls-files topk_megatron/ops/csrc 2>/dev/null))
stamp=$venv/.setup
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$packages $sources" ]; then
    say "$venv is up to date"
    exit 0
fi

pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"
: >"$log"
if [ "$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)" != "$packages" ]; then
    say "installing pinned dependencies (about 7 GB and a few minutes the first time)"
    # torch and setuptools come first: the extension is built against exactly this torch.
    run_logged $pip setuptools ninja torch numpy
    run_logged $pip --no-build-isolation --editable '.[dev]'
    # Exported models also work with transformers 4.57; tests put this folder before the newer version.
    rm -rf "$venv/transformers-4"
    run_logged "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps \
        --target "$venv/transformers-4" --requirement constraints-transformers-4.txt
else
    say "building the extension"
    run_logged $pip --no-build-isolation --no-deps --editable .
fi
printf '%s %s' "$packages" "$sources" >"$stamp"
say "done ($("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)'))"
