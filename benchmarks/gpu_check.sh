#!/usr/bin/env bash
# All that needs a GPU, in one call of less than nine minutes: the tests of tests/gpu, compute-sanitizer's memcheck and
# racecheck over all kernels, and the benchmarks.
#
#     benchmarks/gpu_check.sh [folder for the results, by default benchmarks/results]
#     benchmarks/gpu_check.sh --emulated FOLDER     # without a GPU: every stage, on the host, at small sizes
#
# It needs CuPy; of NVRTC, pytest, hypothesis, torch and compute-sanitizer it says at its start what is missing and how it
# goes on. No network. PYTHON names the interpreter; XPOPTIM_COMMIT the commit, where there is no git. A failure keeps
# nothing else from running, and what was found is on disk at any time. Exit status: 0 if all is well, 1 if anything
# failed or could not be run, 2 without a GPU. `python benchmarks/gpu.py check --help` tells of more options.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu.py" check "$@"
