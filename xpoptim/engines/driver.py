"""All that the CUDA engine asks of CuPy and of the GPU, one small function each: the seam at which tests put a host."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np


def on(device: int) -> AbstractContextManager[Any]:
    """Make a GPU the current one."""
    import cupy

    return cupy.cuda.Device(device)


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


def launch(function: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
    """On the current stream of the current GPU. Arrays of one element, structured too, go by value."""
    function((grid,), (block,), arguments)


def zeros(count: int, dtype: Any) -> Any:
    """Device memory on the current GPU."""
    import cupy

    return cupy.zeros(count, dtype)


def upload(to: Any, values: np.ndarray) -> None:
    to.set(values)


def to_host(array: Any) -> np.ndarray:
    """Waits for the current stream."""
    return array.get()


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    import cupy

    return bool(cupy.cuda.get_current_stream().is_capturing())


def dense(array: Any) -> Any:
    """The array itself if it lies in C order, or a copy that does."""
    import cupy

    return cupy.ascontiguousarray(array)


def copy(to: Any, source: Any) -> None:
    """The values of an array into one of the same shape and dtype, on the current stream."""
    to[...] = source


def array_at(address: int, like: Any, strides: tuple[int, ...]) -> Any:
    """An array as large as ``like`` in memory that somebody else keeps alive."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, like.nbytes, None, like.data.device_id)
    return cupy.ndarray(like.shape, like.dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def converted(array: Any, dtype: str) -> Any:
    return array.astype(dtype)
