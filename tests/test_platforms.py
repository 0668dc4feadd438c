"""Text that depends on the platform is compiled for every platform, on any of them."""

import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

import xpoptim as xo
from xpoptim._dropout import layer as _dropout
from xpoptim.codegen.llvm import blocks as llvm_blocks
from xpoptim.codegen.llvm.elementwise import with_subnormals

TRIPLES = [
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "x86_64-apple-darwin",
    "arm64-apple-darwin",
    "x86_64-unknown-freebsd",
    "x86_64-pc-windows-msvc",
]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def machine_code(text: str, triple: str) -> str:
    """The target's own assembly. LLVM raises if it cannot parse the text, and this test is skipped if LLVM was built
    without the target."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.verify()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(str(error))
    machine = target.create_target_machine(features="+f16c" if triple.startswith("x86_64") else "", opt=1)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return str(machine.emit_assembly(module))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("triple", TRIPLES)
def test_kernels(triple: str, dtype: str) -> None:
    both = xo.Adam(clip_norm=1.0).source("llvm", dtype=dtype)
    norm, update = re.split(r"^(?=; ')", both, flags=re.MULTILINE)[1:]
    texts = [
        norm,
        update,
        *(llvm_blocks.assembly(_dropout.kernel(dtype).program, in_place=same) for same in (True, False)),
    ]
    for text in texts:
        if triple.startswith("x86_64"):
            text = with_subnormals(text, ("prologue", "run"))
        code = machine_code(text, triple)
        assert not re.search(r"\b__\w*[hsd]f2\b|\b__gnu_\w+", code), "calls a routine for float16, which is not linked"


# Python without what Windows lacks, as far as that can be simulated elsewhere.
WITHOUT_POSIX = """
import ctypes, os, sys
import llvmlite.binding, numpy as np  # which look at the platform, too
sys.platform = "win32"
for name in ("fork", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "waitpid"):
    if hasattr(os, name):
        delattr(os, name)
del ctypes.pythonapi
"""


@pytest.mark.smoke
def test_large_and_small_steps_and_dropout_without_posix() -> None:
    code = """
import xpoptim as xo
from xpoptim.engines.cpu import native
assert native.missing()
xo.set_num_threads(2)
for size in (3, 800_000):
    opt, params, grads = xo.SGD(lr=1.0), [np.zeros(size, np.float32)], [np.ones(size, np.float32)]
    with xo.engine("fused"):
        for _ in range(3):
            opt.update(params, grads)
    assert (params[0] == -3).all()
x = np.ones(800_000, np.float32)
assert 0.4 < xo.Dropout(0.5, seed=1)(x).mean() < 0.6
print(opt.explain(params, grads))
"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"XPOPTIM_NATIVE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "fused" in done.stdout
