"""The CUDA engine on a machine without a GPU: its own text, compiled for the host, on host-backed CuPy arrays.

Only `xpoptim.engines.driver`, the seam to CuPy and the GPU, is replaced; tables, sizes and argument types are
the engine's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from xpoptim.engines import cuda, driver, nvrtc

from .host_kernel import HostModule, host_memory, to_cupy, to_numpy


@contextlib.contextmanager
def emulated_gpu(*, backward: bool = False) -> Iterator[list[str]]:
    """Run the CUDA engine on the host; gives the list of the kernels launched so far.

    ``backward`` runs threads and blocks in descending order.
    """
    import array_api_compat.cupy
    import cupy

    launched: list[str] = []

    def launch(function: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        launched.append(function.name)
        function((grid,), (block,), arguments)

    def upload(to: Any, values: np.ndarray) -> None:
        to_numpy_view(to)[...] = values

    def zeros_like(array: Any, dtype: Any = None, **_: Any) -> Any:
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        return cupy.zeros(array.shape, dtype or array.dtype, order)

    replaced = mock.patch.multiple(
        driver,
        on=lambda device: contextlib.nullcontext(),
        architecture=lambda device: "sm_90",
        load=lambda image, arch: HostModule(image.decode(), backward=backward),
        launch=launch,
        zeros=lambda count, dtype: cupy.zeros(count, dtype),
        upload=upload,
        to_host=to_numpy,
        capturing=lambda: False,
        dense=lambda array: array if array.flags.c_contiguous else to_cupy(to_numpy(array)),
        converted=lambda array, dtype: to_cupy(to_numpy(array).astype(dtype)),
    )
    text_as_image = mock.patch.object(nvrtc, "cubin", lambda source, arch, options=(): source.encode())
    no_functions = mock.patch.object(cuda, "_functions", {})
    slots = mock.patch.object(array_api_compat.cupy, "zeros_like", zeros_like)
    with host_memory(), replaced, text_as_image, no_functions, slots:
        yield launched


def to_numpy_view(array: Any) -> np.ndarray:
    """The memory of a host-backed CuPy array as a NumPy array."""
    import ctypes

    memory = (ctypes.c_char * array.nbytes).from_address(array.data.ptr)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)
