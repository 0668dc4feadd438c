"""Text that depends on the platform is compiled for every platform, on any of them."""

import re
import subprocess
import sys
import time

import llvmlite.binding as llvm
import pytest

import xpoptim as xo
from xpoptim._dropout import layer as _dropout
from xpoptim.codegen.llvm import blocks as llvm_blocks
from xpoptim.codegen.llvm.elementwise import with_subnormals
from xpoptim.engines.cpu import scan, thread_pool

# Platforms as `sys.platform` names them, and their targets.
TARGETS = {
    "linux": ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"),
    "darwin": ("x86_64-apple-darwin", "arm64-apple-darwin"),
    "freebsd14": ("x86_64-unknown-freebsd",),
    "win32": ("x86_64-pc-windows-msvc",),
}
TRIPLES = [triple for triples in TARGETS.values() for triple in triples]
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


@pytest.mark.smoke
@pytest.mark.parametrize(("platform", "triple"), [(name, triple) for name in TARGETS for triple in TARGETS[name]])
def test_the_helpers_code(platform: str, triple: str) -> None:
    text = thread_pool._assembly(platform)
    assert ("@sched_setaffinity(" in text) is (platform == "linux")  # no other system has it
    machine_code(text, triple)


@pytest.mark.parametrize("triple", TRIPLES)
def test_the_code_that_looks_at_arrays(triple: str) -> None:
    machine_code(scan._ASSEMBLY, triple)


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


def test_the_clock_is_the_monotonic_one() -> None:
    assert f"@clock_gettime(i32 {time.CLOCK_MONOTONIC}, " in thread_pool._assembly(sys.platform)


@pytest.mark.smoke
@pytest.mark.parametrize("platform", ["darwin", "freebsd14"])
def test_a_step_with_helpers_on_a_platform_that_cannot_move_them(platform: str) -> None:
    code = f"""
import sys
import llvmlite.binding, numpy as np  # which look at the platform, too
sys.platform = {platform!r}
import xpoptim as xo
xo.set_num_threads(2)
opt, params, grads = xo.SGD(lr=1.0), [np.zeros(400_000, np.float32)], [np.ones(400_000, np.float32)]
with xo.engine("fused"):
    for _ in range(3):
        opt.update(params, grads)
from xpoptim.engines.cpu import thread_pool
print((params[0] == -3).all(), len(thread_pool._helpers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr
