"""CuPy under the names and with the arguments of the Array API, which CuPy itself follows only in part.

CuPy 13 lacks some of the names, and no CuPy takes a device where an array is made. What the package itself asks for is
here, so that CuPy arrays need no other library. For what else a plain rule (``fused = False``) may ask for it gets
array-api-compat's functions, or CuPy's own where that is not installed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def _whole() -> Any:
    """The whole of the standard, if it can be had."""
    try:
        import array_api_compat.cupy
    except ImportError:
        import cupy

        return cupy
    return array_api_compat.cupy


def asarray(x: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Any:
    import cupy

    with _on(device):
        made = cupy.array(x, dtype, copy=True) if copy else cupy.asarray(x, dtype)
    if copy is False and made is not x:
        raise ValueError("asarray with copy=False cannot avoid a copy here")
    return made


def astype(x: Any, dtype: Any, /, *, copy: bool = True) -> Any:
    return x.astype(dtype, copy=copy)


def concat(arrays: Any, /, *, axis: int | None = 0) -> Any:
    import cupy

    return cupy.concatenate(arrays, axis)


def arange(start: Any, /, stop: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None) -> Any:
    return _made("arange", device, start, stop, step, dtype)


def empty(shape: Any, *, dtype: Any = float, device: Any = None) -> Any:
    return _made("empty", device, shape, dtype)


def zeros(shape: Any, *, dtype: Any = float, device: Any = None) -> Any:
    return _made("zeros", device, shape, dtype)


def full(shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    return _made("full", device, shape, value, dtype)


def empty_like(x: Any, /, *, dtype: Any = None, device: Any = None) -> Any:
    return _made("empty_like", device, x, dtype)


def zeros_like(x: Any, /, *, dtype: Any = None, device: Any = None) -> Any:
    return _made("zeros_like", device, x, dtype)


def full_like(x: Any, /, value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    return _made("full_like", device, x, value, dtype)


def _made(name: str, device: Any, *arguments: Any) -> Any:
    import cupy

    with _on(device):
        return getattr(cupy, name)(*arguments)


def _on(device: Any) -> AbstractContextManager[Any]:
    """A block on a device, or on the current one for None."""
    import cupy

    return nullcontext() if device is None else cupy.cuda.Device(device)
