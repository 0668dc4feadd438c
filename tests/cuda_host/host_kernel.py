"""The text of CUDA kernels, compiled by g++ and launched on the host on real ``cupy.ndarray`` objects.

`HostModule` stands in for a module that CuPy has loaded, `launch` for a launch on a stream, `host_memory` for
a GPU's memory. So all that is around a kernel runs as it does on a GPU: the table of pointers, the sizes of
arguments, the choice between vector and scalar accesses. shim.h says what cannot be seen this way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

HERE = Path(__file__).parent

# No contraction to fused multiply-adds, as with NVRTC; a vector may be read where floats were written; and a
# kernel's name stays its own, also where the C library has a function of that name.
FLAGS = (
    "-O1",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fvisibility=hidden",
)
SANITIZERS = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZE = "XPOPTIM_HOST_SANITIZE"  # the environment variable by which `run_sanitized` tells its child


def missing() -> str | None:
    """What keeps kernels from running on this host, or None: the reason to give to ``pytest.mark.skipif``."""
    if sys.platform != "linux":
        return "kernels run on the host only where that is Linux"
    if shutil.which("g++") is None:
        return "g++, which compiles the kernels for the host, is not installed"
    if find_spec("cupy") is None:
        return "CuPy (cupy-cuda13x or cupy-cuda12x) is not installed"
    return None


# --- modules and launches


class HostModule:
    """Kernels compiled for the host; ``backward`` runs threads and blocks in descending order.

    Run a kernel in both orders: a missing barrier shows in one of them.
    """

    def __init__(self, source: str, *, backward: bool = False) -> None:
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(", source)
        exports = "".join(f"HOST_KERNEL({name})\n" for name in names)
        self._library = ctypes.CDLL(str(_build(f'#include "shim.h"\n#line 1 "kernel.cu"\n{source}\n{exports}')))
        self._names = names
        self._backward = backward
        self._lock = threading.Lock()  # the state of a launch is static

    def get_function(self, name: str) -> HostKernel:
        """As CuPy's modules have it."""
        if name not in self._names:
            raise AttributeError(f"there is no kernel {name!r}, only {self._names}")
        return HostKernel(name, self._library, self._lock, self._backward)


class HostKernel:
    """A kernel to be called as CuPy's are. An argument of another size than its parameter is a TypeError."""

    def __init__(self, name: str, library: ctypes.CDLL, lock: Any, backward: bool) -> None:
        sizes = (ctypes.c_int * 64)()
        count = getattr(library, f"{name}_sizes")(sizes)
        self.name = name
        self.sizes = list(sizes)[:count]
        self._run = getattr(library, f"{name}_run")
        self._run.restype = ctypes.c_char_p
        self._lock = lock
        self._backward = backward

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], stream: Any = None) -> None:
        self.prepared(grid, block, args)()

    def prepared(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any]) -> Callable[[], None]:
        """The launch with its parameters as they are now: that they change later, or are freed, does not matter."""
        if len(args) != len(self.sizes):
            raise TypeError(f"kernel {self.name} takes {len(self.sizes)} arguments, {len(args)} were given")
        values = [_by_value(argument).copy() for argument in args]
        for number, (value, size) in enumerate(zip(values, self.sizes, strict=True)):
            if value.nbytes != size:
                given = f"argument {number} of kernel {self.name} is of {value.nbytes} bytes"
                raise TypeError(f"{given}, its parameter of {size}")
        if sum(self.sizes) > 32764:
            raise TypeError(f"the parameters of kernel {self.name} take {sum(self.sizes)} bytes, 32764 are allowed")
        shape = [*_three(grid, "grid"), *_three(block, "block")]

        def run() -> None:
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            with self._lock:
                trouble = self._run((ctypes.c_uint * 6)(*shape), int(self._backward), pointers)
            if trouble:
                raise RuntimeError(f"kernel {self.name}: {trouble.decode()}")

        return run


def launch(
    module: HostModule,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: Sequence[Any],
    stream: Any = None,
) -> None:
    """Launch a kernel of a module; the launch has ended on return, whatever the stream."""
    module.get_function(name)(grid, block, args, stream)


def _three(extent: tuple[int, ...], what: str) -> tuple[int, ...]:
    if not isinstance(extent, tuple):  # CuPy takes nothing else
        raise TypeError(f"{what} must be a tuple, not {type(extent).__name__}")
    if any(number < 1 for number in extent):
        raise ValueError(f"{what} {extent} is empty, and CuPy would launch one block all the same")
    return (*extent, 1, 1)[:3]


def _by_value(argument: Any) -> np.ndarray:
    """The bytes that CuPy would hand to a kernel for an argument."""
    import cupy

    if isinstance(argument, cupy.ndarray):
        return np.array([argument.data.ptr], np.uint64)
    if isinstance(argument, cupy.cuda.MemoryPointer):
        return np.array([argument.ptr], np.uint64)
    if isinstance(argument, np.ndarray):
        if argument.size != 1:
            raise TypeError(f"a NumPy array of shape {argument.shape} as an argument: only one element goes by value")
        return argument
    if isinstance(argument, np.generic | bool | int | float | complex):
        return np.array([argument])
    # None among them: it is a null pointer in CuPy 14, but no argument at all in CuPy 13.
    raise TypeError(f"{type(argument).__name__} is no argument for a kernel")


def _build(text: str) -> Path:
    """The shared library for a text, compiled unless it was before."""
    flags = (*FLAGS, *(SANITIZERS if os.environ.get(SANITIZE) else ()))
    folder = Path(tempfile.gettempdir(), f"xpoptim-host-kernels-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    shim = (HERE / "shim.h").read_text()
    path = folder / f"{hashlib.sha256(repr((text, shim, flags, _compiler())).encode()).hexdigest()}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (Path(scratch) / "kernel.cpp").write_text(text)
            made = Path(scratch) / "kernel.so"
            command = ["g++", *flags, f"-I{HERE}", f"{scratch}/kernel.cpp", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ could not compile the kernel:\n{done.stderr}\n{text}")
            os.replace(made, path)  # under a name of its own: a library in use is never overwritten
    return path


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


# --- memory


class Memory:
    """Memory as a GPU's allocator gives it out: at a multiple of 512, and with anything in it, here NaN."""

    _libc = ctypes.CDLL(None)

    def __init__(self, size: int) -> None:
        pointer = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(pointer), ctypes.c_size_t(512), ctypes.c_size_t(size)):
            raise MemoryError(f"no {size} bytes")
        assert pointer.value is not None
        self.address = pointer.value
        ctypes.memset(self.address, 0xFF, size)

    @classmethod
    def of(cls, address: int) -> Memory:
        """Memory that was taken before."""
        memory = cls.__new__(cls)
        memory.address = address
        return memory

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._libc.free(ctypes.c_void_p(self.address))


def _allocate(size: int) -> Any:
    import cupy

    memory = Memory(size)
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.address, size, memory, 0), 0)


def to_cupy(array: Any, offset: int = 0) -> Any:
    """A dense CuPy array with the values of an array, ``offset`` bytes beyond a multiple of 512.

    Nothing lies behind its last byte, so that AddressSanitizer sees an access there.
    """
    import cupy

    values = np.ascontiguousarray(array).reshape(np.shape(array))
    pointer = _allocate(values.nbytes + offset) + offset
    ctypes.memmove(pointer.ptr, values.ctypes.data, values.nbytes)
    return cupy.ndarray(values.shape, values.dtype, memptr=pointer)


def to_numpy(array: Any) -> np.ndarray:
    """A copy of a CuPy array's values, whatever its strides."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)

    interface = {
        "version": 3,
        "shape": array.shape,
        "typestr": np.dtype((np.void, array.itemsize)).str,  # dtypes of other packages have no typestr
        "strides": array.strides,
        "data": (array.data.ptr, True),
    }
    raw = np.array(SimpleNamespace(__array_interface__=interface), copy=True, order="C")
    return raw.view(array.dtype)


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """Let CuPy allocate on the host; ``zeros``, ``asarray`` and ``asnumpy`` of CuPy work on such arrays."""
    import cupy

    def zeros(shape: Any, dtype: Any = float, order: str = "C", **_: Any) -> Any:
        array = cupy.empty(shape, dtype, order)
        ctypes.memset(array.data.ptr, 0, array.nbytes)
        return array

    def asarray(a: Any, dtype: Any = None, **_: Any) -> Any:
        same = isinstance(a, cupy.ndarray) and dtype in (None, a.dtype)
        return a if same else to_cupy(np.asarray(to_numpy(a) if isinstance(a, cupy.ndarray) else a, dtype))

    def asnumpy(a: Any, **_: Any) -> np.ndarray:
        return to_numpy(a) if isinstance(a, cupy.ndarray) else np.asarray(a)

    working = mock.patch.multiple(cupy, zeros=zeros, asarray=asarray, asnumpy=asnumpy)
    with working, cupy.cuda.using_allocator(_allocate):
        yield


# --- sanitizers


def run_sanitized(*arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run Python in a process in which kernels are compiled with AddressSanitizer and UBSan.

    ``arguments`` are the interpreter's: ``"-c", code`` or ``"-m", "pytest", ...``. What is found ends the
    process with an exit status and a report on its standard error.
    """
    # Python itself is not instrumented, so the library has to be there from the start; libstdc++ too, for it
    # could not take over the throwing of exceptions else.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        SANITIZE: "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), *filter(None, sys.path)]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
