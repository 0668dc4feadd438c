"""The CUDA engine on a machine without a GPU: its own text, compiled for the host, on host-backed CuPy arrays.

Only `xpoptim.engines.driver`, the seam to CuPy and the GPU, is replaced, and of CuPy what would start a kernel of
its own to make or fill an array; tables, sizes and argument types are the engine's own. A launch has ended when it
returns, so what needs time, streams or a real graph cannot be seen here.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from xpoptim.engines import cuda, driver, nvrtc

from .host_kernel import HostModule, host_memory, to_cupy, to_numpy
from .steps import GPU, Graph


class RecordedGraph(Graph):
    """What was launched while a step was captured, to be carried out again and again."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.launches: list[Callable[[], None]] = []

    def launch(self) -> None:
        for run in self.launches:
            run()


class EmulatedGPU(GPU):
    """Any number of GPUs, of which one is the current one."""

    def __init__(self) -> None:
        super().__init__()
        self._current = 0
        self._graph: RecordedGraph | None = None
        self._quiet = False

    @property
    def device(self) -> int:
        return self._current

    def array(self, values: Any, offset: int = 0, device: int = 0) -> Any:
        return like(values, offset, device)

    def to_numpy(self, array: Any) -> np.ndarray:
        return to_numpy(array)

    def fill(self, array: Any, values: Any) -> None:
        seen(array)[...] = values

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        self._graph = RecordedGraph()
        try:
            with self.quiet():
                yield self._graph
        finally:
            self._graph = None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        import cupy

        def refuse(size: int) -> Any:
            raise AssertionError(f"{size} bytes of device memory are allocated")

        self._quiet = True
        try:
            with cupy.cuda.using_allocator(refuse):
                yield
        finally:
            self._quiet = False

    # What takes the place of the functions of `driver`.

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self._current = self._current, device
        try:
            yield
        finally:
            self._current = before

    def launch(self, function: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        import cupy

        arrays = [a for a in arguments if isinstance(a, cupy.ndarray)]
        for array in arrays:
            assert array.data.device_id == self.device, (
                f"{function.name} is launched on device {self.device} with memory of device {array.data.device_id}"
            )
        # CUDA takes the parameters when a launch is made: what they hold later does not matter.
        taken = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in arguments)
        self._run(function.name, lambda: function((grid,), (block,), taken))

    def copy(self, to: Any, source: Any) -> None:  # type: ignore[override]
        def run() -> None:
            seen(to)[...] = seen(source)

        self._run("copy", run)

    def _run(self, name: str, run: Callable[[], None]) -> None:
        if self._graph is not None:
            self._graph.names.append(name)
            self._graph.launches.append(run)
            return
        self.append(name)
        self.devices.append(self.device)
        run()

    def zeros(self, count: int, dtype: Any) -> Any:
        import cupy

        self._expected("zeros")
        return on_device(cupy.zeros(count, dtype), self.device)

    def upload(self, to: Any, values: np.ndarray) -> None:
        self._expected("upload")
        seen(to)[...] = values

    def to_host(self, array: Any) -> np.ndarray:
        self._expected("to_host")
        assert array.data.device_id == self.device
        return to_numpy(array)

    def dense(self, array: Any) -> Any:
        if array.flags.c_contiguous:
            return array
        self._expected("dense")
        return on_device(to_cupy(to_numpy(array)), array.data.device_id)

    def converted(self, array: Any, dtype: str) -> Any:
        self._expected("converted")
        return on_device(to_cupy(to_numpy(array).astype(dtype)), array.data.device_id)

    # What takes the place of CuPy's functions.

    def full_like(self, array: Any, value: Any, dtype: Any = None) -> Any:
        self._expected("full_like")
        return like(np.full_like(seen(array), value, dtype, order="K"), device=array.data.device_id)

    def asarray(self, values: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Any:
        import cupy

        if not isinstance(values, cupy.ndarray):
            self._expected("asarray")
            return like(np.array(values, dtype), device=getattr(device, "id", 0))
        if not copy and dtype in (None, values.dtype):
            return values
        self._expected("asarray")
        return like(np.array(seen(values), dtype, order="K"), device=values.data.device_id)

    def _expected(self, what: str) -> None:
        assert not self._quiet, f"{what} in a step that may neither wait nor allocate"


@contextlib.contextmanager
def emulated_gpu(*, backward: bool = False) -> Iterator[EmulatedGPU]:
    """Run the CUDA engine on the host; ``backward`` runs threads and blocks in descending order."""
    from xpoptim import cupy_namespace

    gpu = EmulatedGPU()
    replaced = mock.patch.multiple(
        driver,
        on=gpu.on,
        architecture=lambda device: "sm_90",
        load=lambda image, arch: HostModule(image.decode(), backward=backward),
        launch=gpu.launch,
        zeros=gpu.zeros,
        upload=gpu.upload,
        to_host=gpu.to_host,
        capturing=lambda: gpu._graph is not None,
        dense=gpu.dense,
        copy=gpu.copy,
        converted=gpu.converted,
    )
    text_as_image = mock.patch.object(nvrtc, "cubin", lambda source, arch, options=(): source.encode())
    no_functions: Any = mock.patch.object(cuda, "_functions", {})
    makers = mock.patch.multiple(
        cupy_namespace,
        zeros_like=lambda array, dtype=None: gpu.full_like(array, 0, dtype),
        full_like=gpu.full_like,
        asarray=gpu.asarray,
    )
    with host_memory(), replaced, text_as_image, no_functions, makers:
        yield gpu


# --- arrays


def seen(array: Any) -> np.ndarray:
    """The memory of a host-backed CuPy array as a NumPy array of the same strides, to be read and written."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    interface = {
        "version": 3,
        "shape": array.shape,
        "typestr": np.dtype((np.void, array.itemsize)).str,  # dtypes of other packages have no typestr
        "strides": array.strides,
        "data": (array.data.ptr, False),
    }
    view = np.asarray(SimpleNamespace(__array_interface__=interface)).view(array.dtype)
    assert view.ctypes.data == array.data.ptr
    return view


def on_device(array: Any, device: int) -> Any:
    """The same memory, said to be of another device."""
    import cupy

    memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, array, device)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)


def like(values: np.ndarray, offset: int = 0, device: int = 0) -> Any:
    """A CuPy array with the values, strides and all, ``offset`` bytes beyond a multiple of 512."""
    import cupy

    values = np.asarray(values)
    low, high = np.lib.array_utils.byte_bounds(values) if values.size else (values.ctypes.data, values.ctypes.data)
    room = to_cupy(np.frombuffer(ctypes.string_at(low, high - low), np.uint8), offset)
    memory = cupy.cuda.UnownedMemory(room.data.ptr, room.nbytes, room, device)
    pointer = cupy.cuda.MemoryPointer(memory, values.ctypes.data - low)
    return cupy.ndarray(values.shape, values.dtype, pointer, values.strides)
