"""CuPy under the names and with the arguments of the Array API, which CuPy itself follows only in part.

CuPy 13 lacks some of the names, and no CuPy takes a device where an array is made. What the package itself asks for is
here, so that CuPy arrays need no other library. For what else a plain rule (``fused = False``) may ask for it gets
array-api-compat's functions, or CuPy's own where that is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from ..types import CuPyArray, Device, DType, Shape

# What every CuPy has as the standard does, as far as the package goes.
_ELEMENTWISE = {"abs", "imag", "isfinite", "logical_and", "logical_not", "logical_or", "logical_xor", "real", "sqrt"}
_OTHERS = {"broadcast_to", "copyto", "reshape", "stack", "where"}
_DTYPES = {"complex64", "complex128", "float16", "float32", "float64", "int64", "uint32", "uint64"}
CUPYS_OWN = _ELEMENTWISE | _OTHERS | _DTYPES


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    import cupy

    if name == "bool":
        return cupy.bool_
    return getattr(cupy if name in CUPYS_OWN else _whole(), name)


def _whole() -> ModuleType:
    """The whole of the standard, if it can be had."""
    try:
        import array_api_compat.cupy
    except ImportError:
        import cupy

        return cupy
    return array_api_compat.cupy


def asarray(x: object, /, *, dtype: DType = None, device: Device = None, copy: bool | None = None) -> CuPyArray:
    import cupy

    with on(device):
        made = cupy.array(x, dtype, copy=True) if copy else cupy.asarray(x, dtype)
    if copy is False and made is not x:
        raise ValueError("asarray with copy=False cannot avoid a copy here")
    return made


def astype(x: CuPyArray, dtype: DType, /, *, copy: bool = True) -> CuPyArray:
    return x.astype(dtype, copy=copy)


def concat(arrays: Sequence[CuPyArray], /, *, axis: int | None = 0) -> CuPyArray:
    import cupy

    return cupy.concatenate(arrays, axis)


def arange(start: int, /, stop: int | None = None, step: int = 1, *, dtype: DType = None, device: Device = None) -> Any:
    return _made("arange", device, start, stop, step, dtype)


def empty(shape: int | Shape, *, dtype: DType = float, device: Device = None) -> CuPyArray:
    return _made("empty", device, shape, dtype)


def zeros(shape: int | Shape, *, dtype: DType = float, device: Device = None) -> CuPyArray:
    return _made("zeros", device, shape, dtype)


def full(shape: int | Shape, value: complex, *, dtype: DType = None, device: Device = None) -> CuPyArray:
    return _made("full", device, shape, value, dtype)


def empty_like(x: CuPyArray, /, *, dtype: DType = None, device: Device = None) -> CuPyArray:
    return _made("empty_like", device, x, dtype)


def zeros_like(x: CuPyArray, /, *, dtype: DType = None, device: Device = None) -> CuPyArray:
    return _made("zeros_like", device, x, dtype)


def full_like(x: CuPyArray, /, value: complex, *, dtype: DType = None, device: Device = None) -> CuPyArray:
    return _made("full_like", device, x, value, dtype)


def _made(name: str, device: Device, *arguments: object) -> Any:
    import cupy

    with on(device):
        return getattr(cupy, name)(*arguments)


def on(device: Device) -> AbstractContextManager[object]:
    """A block on a device, or on the current one for None."""
    import cupy

    return nullcontext() if device is None else cupy.cuda.Device(device)
