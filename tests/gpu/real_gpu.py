"""A real GPU behind the interface that the emulated one has, so that both run the same tests.

With ``XPOPTIM_TEST_GPU=emulated`` what is here runs on an emulated CuPy instead, and at small sizes: so a slip in these
tests shows without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cuda_host.emulated import emulated_gpu
from cuda_host.host_kernel import missing
from cuda_host.steps import GPU

from xpoptim.engines.cuda import driver, nvrtc
from xpoptim.engines.cuda import plan as cuda

EMULATED = os.environ.get("XPOPTIM_TEST_GPU") == "emulated"
# What an emulation cannot show: CuPy's pool and its kernels, the driver's loader, a GPU's memory.
needs_a_real_one = pytest.mark.skipif(EMULATED, reason="needs a GPU that is not emulated")

# Keeps a GPU busy for so many nanoseconds. Emulated work takes until it is waited for.
SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
#ifdef __CUDA_ARCH__
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < (unsigned long long)nanoseconds);
#endif
}
"""
LONG = 300_000_000  # nanoseconds: a hundred times what a step takes the host


def size(real: int, emulated: int) -> int:
    """Elements or steps of a test."""
    return emulated if EMULATED else real


def why_not() -> str:
    """What keeps these tests from running here, or an empty string."""
    if EMULATED:
        return missing() or ""
    if find_spec("cupy") is None:
        return "needs a GPU, and CuPy (pip install '.[cuda13]')"
    import cupy  # after ml_dtypes, which `cuda_host.steps` has imported: so it knows bfloat16

    try:
        available = cupy.cuda.is_available()
    except cupy.cuda.runtime.CUDARuntimeError:  # CuPy 13, where there is no driver
        available = False
    if not available:
        return "needs a GPU: CuPy finds no NVIDIA GPU, or no driver for it"
    try:
        nvrtc.version()
    except ImportError as error:
        return str(error)
    return ""


def skip_without_gpu() -> None:
    """For the top of a module: one line of the report for all of its tests."""
    if reason := why_not():
        pytest.skip(reason, allow_module_level=True)


class _Named:
    """A kernel of CuPy's that knows its name."""

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self._function = function

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self._function(*arguments, **named)


class RealGPU(GPU):
    """The GPUs of this machine; everything runs on one stream of the first, which is not the default one."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream
        self._spin: dict[int, Any] = {}  # a kernel that takes long, for each device

    def array(self, values: Any, offset: int = 0, device: int = 0) -> Any:
        import cupy

        if device >= cupy.cuda.runtime.getDeviceCount():
            pytest.skip("needs two GPUs")
        values = np.asarray(values)
        low, high = np.lib.array_utils.byte_bounds(values) if values.size else (values.ctypes.data, values.ctypes.data)
        with cupy.cuda.Device(device):
            room = cupy.cuda.alloc(high - low + offset) + offset
            if high > low:
                raw = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
                cupy.ndarray((high - low,), np.uint8, room).set(raw)
                cupy.cuda.get_current_stream().synchronize()  # so that any stream may read it
        return cupy.ndarray(values.shape, values.dtype, room + (values.ctypes.data - low), values.strides)

    def to_numpy(self, array: Any) -> np.ndarray:
        import cupy

        for device in range(cupy.cuda.runtime.getDeviceCount()):
            cupy.cuda.Device(device).synchronize()
        return self._mirror(array)[0].copy(order="C")

    def fill(self, array: Any, values: Any) -> None:
        if not array.size:
            return
        view, raw, memory = self._mirror(array)
        view[...] = values
        with driver.beside(memory):
            memory.set(raw)

    def _mirror(self, array: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        """The array as NumPy has it, in a copy of its memory; that copy; and its memory on the GPU, gaps and all."""
        import cupy

        if not array.size:
            empty = np.empty(array.shape, array.dtype)
            return empty, empty, None
        ends = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        before, size = sum(min(end, 0) for end in ends), sum(abs(end) for end in ends) + array.itemsize
        with cupy.cuda.Device(array.data.device_id):
            memory = cupy.ndarray((size,), np.uint8, array.data + before)
            raw = memory.get()
        return np.ndarray(array.shape, array.dtype, raw, -before, array.strides), raw, memory

    def busy(self, stream: Any) -> Any:
        import cupy

        device = self.device if stream.device_id == -1 else stream.device_id
        with cupy.cuda.Device(device):
            if device not in self._spin:  # to load a module may wait for the GPU
                arch = driver.architecture(device)
                self._spin[device] = driver.load(nvrtc.cubin(SPIN, arch), arch).get_function("spin")
            self._spin[device]((1,), (1,), (np.int64(LONG),), stream=stream)
            return stream.record(cupy.cuda.Event())

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        import cupy

        class NoMemory(cupy.cuda.MemoryHook):
            name = "no memory"

            def malloc_preprocess(self, **about: Any) -> None:
                raise AssertionError(f"{about['size']} bytes of device memory are allocated")

        def refuse(*_: Any) -> Any:
            raise AssertionError(
                "a step that may not wait makes an event or a stream, waits, or copies to or from the host"
            )

        refused = ("upload", "to_host", "zeros", "event", "new_stream", "synchronize")
        with mock.patch.multiple(driver, **dict.fromkeys(refused, refuse)), NoMemory():
            yield


@contextlib.contextmanager
def real_gpu() -> Iterator[RealGPU]:
    """The GPU, with a record of what the engine launches."""
    with emulated_gpu() if EMULATED else contextlib.nullcontext(), _real_gpu() as gpu:
        yield gpu


@contextlib.contextmanager
def _real_gpu() -> Iterator[RealGPU]:
    import cupy

    gpu = RealGPU(cupy.cuda.Stream(non_blocking=True))
    load = driver.load

    def loaded(image: bytes, arch: str) -> Any:
        module = load(image, arch)
        return mock.Mock(get_function=lambda name: _Named(name, module.get_function(name)))

    named = mock.patch.object(driver, "load", loaded)
    with named, gpu.recorded(), mock.patch.object(cuda, "_functions", {}), gpu.stream:
        yield gpu
        gpu.stream.synchronize()
