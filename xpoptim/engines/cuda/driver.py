"""All that the CUDA engine asks of CuPy and of the GPU, one small function each: the seam at which tests put a host.

CuPy allocates and computes on the current GPU, wherever the arrays that it is given lie. So what is given an array here
makes that array's GPU the current one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np

from ...arrays.namespaces.cupy_namespace import on
from ...arrays.types import CuPyArray, DType, Shape


class Stream(Protocol):
    def wait_event(self, event: Event) -> None: ...
    def is_capturing(self) -> bool: ...


class Event(Protocol):
    def record(self, stream: Stream) -> None: ...


Function: TypeAlias = Callable[[tuple[int], tuple[int], tuple[object, ...]], None]  # of grid, block and arguments


def beside(array: CuPyArray) -> AbstractContextManager[object]:
    """Make an array's own GPU the current one."""
    return on(array.data.device_id)


@lru_cache(maxsize=64)
def architecture(device: int) -> str:
    import cupy

    return f"sm_{cupy.cuda.Device(device).compute_capability}"


def load(image: bytes, arch: str) -> Any:
    """A cubin on the current GPU."""
    import cupy

    from . import nvrtc

    module = cupy.cuda.function.Module()
    try:
        module.load(image)
    except cupy.cuda.driver.CUDADriverError as error:
        raise nvrtc.load_error(error, arch, cupy.cuda.runtime.driverGetVersion()) from error
    return module


def launch(function: Function, grid: int, block: int, arguments: tuple[object, ...]) -> None:
    """On the current stream of the current GPU. Arrays of one element, structured too, go by value."""
    function((grid,), (block,), arguments)


def zeros(count: int, dtype: DType) -> CuPyArray:
    """Device memory on the current GPU."""
    import cupy

    return cupy.zeros(count, dtype)


def upload(to: CuPyArray, values: np.ndarray) -> None:
    with beside(to):
        to.set(values)


def to_host(array: CuPyArray, stream: Stream | None = None) -> np.ndarray:
    """In C order, or in Fortran's if the array lies in that. Waits for a stream, or the current one of its GPU."""
    with beside(array):
        return array.get(stream, order="A")


def stream(device: int) -> Stream:
    """The current stream of a GPU."""
    import cupy

    return cupy.cuda.get_current_stream(device)


def capturing(device: int) -> bool:
    """Whether the current stream of a GPU is being captured into a CUDA graph."""
    return bool(stream(device).is_capturing())


def closed(stream: Stream) -> bool:
    """Whether work that a stream was given now would go into a capture, or break one."""
    try:
        return bool(stream.is_capturing())
    except RuntimeError:  # CUDA's, for the default stream while a stream that waits for it is captured
        return True


def new_stream() -> Stream:
    """On the current GPU; it waits for no other stream."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def event() -> Event:
    """On the current GPU, to be recorded as often as wanted."""
    import cupy

    return cupy.cuda.Event(disable_timing=True)


def synchronize(device: int) -> None:
    """Wait for all that a GPU was given, in whatever stream."""
    import cupy

    cupy.cuda.Device(device).synchronize()


def dense(array: CuPyArray) -> CuPyArray:
    """The array itself if it lies in C order, or a copy that does."""
    import cupy

    with beside(array):
        return cupy.ascontiguousarray(array)


def copy(to: CuPyArray, source: CuPyArray) -> None:
    """The values of an array into one of the same shape and dtype on the same GPU, on its current stream."""
    with beside(to):
        to[...] = source


def array_at(address: int, like: CuPyArray, strides: Shape) -> CuPyArray:
    """An array as large as ``like`` in memory that somebody else keeps alive."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, like.nbytes, None, like.data.device_id)
    return cupy.ndarray(like.shape, like.dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def converted(array: CuPyArray, dtype: str) -> CuPyArray:
    with beside(array):
        return array.astype(dtype)
