#!/usr/bin/env bash
# All that needs a GPU, in one call of less than eight minutes: the tests of tests/gpu, compute-sanitizer's memcheck and
# racecheck over all kernels, and the benchmarks.
#
#     benchmarks/gpu_check.sh [folder for the results, by default benchmarks/results]
#
# It needs CuPy, NVRTC, pytest and hypothesis, and torch to compare with; no network. PYTHON names the interpreter.
# A failure does not keep the rest from running. Exit status: 0 if all is well, 1 if anything failed, 2 without a GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(realpath -m "${1:-$here/results}")
cd "$here/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$python" benchmarks/gpu.py --probe || exit 2

checks=()
status=0

# run NAME SECONDS COMMAND...: its outcome is kept, and what follows runs in any case.
run() {
    local name=$1 seconds=$2 code=0 outcome=passed
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" || code=$?
    if ((code == 124 || code == 137)); then
        outcome="stopped after $seconds seconds"
    elif ((code != 0)); then
        outcome=failed
    fi
    ((code == 0)) || status=1
    checks+=("$name=$outcome")
    echo "== $name: $outcome"
}

# Third-party packages' warnings are no errors here: their versions are the machine's.
run tests 170 "$python" -m pytest -q -rfE -W default -p no:cacheprovider tests/gpu

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in memcheck racecheck; do
    # What a library tries and handles itself is no error of ours; a failed launch raises in Python.
    options=(--tool "$tool" --error-exitcode 9 --print-limit 20)
    [[ $tool == racecheck ]] || options+=(--report-api-errors no)
    if [[ -n $sanitizer ]]; then
        run "$tool" 55 "$sanitizer" "${options[@]}" "$python" benchmarks/gpu.py --small
    else
        echo "== $tool: compute-sanitizer is not installed"
        checks+=("$tool=not run: compute-sanitizer is not installed")
        status=1
    fi
done

checks_given=$(IFS=,; echo "${checks[*]}")
run benchmarks 190 "$python" benchmarks/gpu.py --out "$out" --checks "$checks_given"

printf '\n'
printf '== %s\n' "${checks[@]}"
exit "$status"
