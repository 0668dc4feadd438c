#!/usr/bin/env bash
# Compiles the CUDA kernels with other versions of CuPy and NVRTC: an environment for each pair, and in a process of its
# own the tests that need no GPU; what is asked of CuPy is held against the functions that it has. And environments
# without NVRTC, where the report has to say what is missing.
#
#     tests/nvrtc_versions.sh [folder for the environments, by default a new one that is removed afterwards]
#
# It needs PyPI; environments that are there already are used again. PYTHON names the interpreter, 3.11 or later.
# A failure does not keep the rest from running. Exit status: 0 if all is well, 1 if anything failed.
set -euo pipefail

work=${1:-}
if [[ -z $work ]]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
work=$(realpath -m "$work")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD" XPOPTIM_CACHE_DIR="$work/kernels" PIP_DISABLE_PIP_VERSION_CHECK=1
unset CUDA_PATH CUDA_HOME CONDA_PREFIX LD_LIBRARY_PATH # so that nothing but the environment's own wheels is found

report='from xpoptim.engines.cuda import nvrtc; print(nvrtc.describe()["NVRTC"])'
status=0

# check EXPECTED REQUIREMENT...: the report begins with what is expected, and the tests pass.
check() {
    local expected=$1 name python found
    shift
    name=$(tr -cs 'a-z0-9.\n' - <<<"${*:-no cupy}")
    python="$work/$name/bin/python"
    echo "== ${*:-no CuPy}"
    if [[ ! -x $python ]]; then
        "${PYTHON:-python3}" -m venv "$work/$name"
        "$python" -m pip install -q numpy llvmlite array-api-compat ml_dtypes pytest pytest-timeout hypothesis "$@" ||
            { rm -rf "${work:?}/$name"; status=1; return; }
    fi
    found=$("$python" -c "$report") || true
    echo "NVRTC: $found"
    [[ $found == "$expected"* ]] || { echo "FAILED: expected $expected"; status=1; }
    "$python" -m pytest -q -p no:cacheprovider tests/test_nvrtc.py tests/test_cuda_text.py tests/test_own_libraries.py ||
        status=1
}

check '12.4, through CuPy 13.' 'cupy-cuda12x==13.*' 'nvidia-cuda-nvrtc-cu12==12.4.*' 'cuda-pathfinder==1.3.4'
check '12.4, through CuPy 14.' 'cupy-cuda12x==14.*' 'nvidia-cuda-nvrtc-cu12==12.4.*'
check '13.0, through CuPy 13.' 'cupy-cuda13x==13.*' 'nvidia-cuda-nvrtc==13.0.*' 'cuda-pathfinder==1.3.4'
check '13.0, through CuPy 14.' 'cupy-cuda13x==14.*' 'nvidia-cuda-nvrtc==13.0.*'
check '13.' 'cupy-cuda13x' 'nvidia-cuda-nvrtc==13.*'
check 'missing: NVRTC, ' 'cupy-cuda12x==13.*'
check 'missing: NVRTC, ' 'cupy-cuda13x==14.*'
check 'missing: CuPy, '
exit $status
