#!/usr/bin/env bash
# The extension compiles and links for macOS, by the C compiler of the ziglang wheel and the headers of NumPy's macOS wheels.
#     tests/native/macos.sh         (it needs `pip install ziglang` and PyPI)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR="$work/zig" PIP_DISABLE_PIP_VERSION_CHECK=1
python_headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
for target in x86_64:macosx_14_0_x86_64 aarch64:macosx_14_0_arm64; do
    IFS=: read -r machine platform <<<"$target"
    pip download -q --no-deps --only-binary :all: --python-version 3.11 --platform "$platform" --dest "$work/$machine" 'numpy>=2.1'
    python -m zipfile -e "$work/$machine"/numpy-*.whl "$work/$machine/numpy"
    numpy_headers="$work/$machine/numpy/numpy/_core/include"
    python -m ziglang cc -target "$machine-macos" -std=c11 -O2 -Wall -Wextra -Werror \
        -Wno-missing-field-initializers -Wno-unused-parameter -isystem "$python_headers" -isystem "$numpy_headers" \
        -shared -undefined dynamic_lookup xpoptim/engines/cpu/native.c -o "$work/$machine/_native.abi3.so"
    python - "$work/$machine/_native.abi3.so" "$machine" <<'PY'
import struct, sys
magic, cpu = struct.unpack("<II", open(sys.argv[1], "rb").read(8))
assert magic == 0xFEEDFACF and cpu == {"x86_64": 0x01000007, "aarch64": 0x0100000C}[sys.argv[2]], (hex(magic), hex(cpu))
PY
    echo "macOS on $machine: compiled and linked"
done
