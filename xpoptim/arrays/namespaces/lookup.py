"""Which library an array is of, its namespace, its device and its dtype's name."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np

from ..types import Array, Device, Namespace
from .libraries import CUPY, CUPY_NAMESPACE, NUMPY, NUMPY_NAMESPACE, Library, compat, other

_numpy_name = lru_cache(maxsize=256)(lambda dtype: dtype.name)  # NumPy takes a microsecond to spell it


def library_of(x: object) -> Library | None:
    """The library of an array, or None if ``x`` is no array."""
    if isinstance(x, np.ndarray | np.generic):
        return NUMPY
    cupy = sys.modules.get("cupy")  # nobody has an array of a library that was not imported
    if cupy is not None and isinstance(x, getattr(cupy, "ndarray", ())):
        return CUPY
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return None
    if not compat(x).is_array_api_obj(x):
        return None
    for name in ("torch", "jax"):
        if getattr(compat(x), f"is_{name}_array")(x):
            return other(name)
    return other(compat(x).array_namespace(x).__name__)


def library_behind(xp: object) -> Library:
    """The library of a namespace."""
    name = getattr(xp, "__name__", "")  # not every namespace is a module
    if name.endswith(".cupy_namespace"):
        return CUPY
    short = name.removeprefix("array_api_compat.").removesuffix(".numpy")
    return {"numpy": NUMPY, "cupy": CUPY}.get(short) or other(short)


def library_with(x: object) -> Library:
    """The library of what is known to be an array."""
    library = library_of(x)
    if library is None:
        raise TypeError(f"{type(x).__name__} is no array of an Array API library")
    return library


def namespace(x: object) -> Namespace:
    """The Array API namespace of an array."""
    return library_with(x).namespace(x)


def device_of(x: Array) -> Device:
    """Where an array lies: something to compare, and to hand to its namespace's functions."""
    return library_with(x).device(x)


def beside(x: Array) -> AbstractContextManager[object]:
    """A block in which a library that computes on a current device does so on the array's own."""
    library = library_with(x)
    return library.on(library.device(x))


def dtype_name(array: Array) -> str:
    """The dtype as NumPy spells it, whatever the namespace."""
    dtype = array.dtype
    if isinstance(dtype, np.dtype):  # NumPy, CuPy, JAX
        return _numpy_name(dtype)
    return str(dtype).rsplit(".", 1)[-1]  # torch.float32, array_api_strict.float32


def standard(xp: Any) -> Namespace:
    """A library's own module, or NumPy for None, under the names of the Array API: torch's, for one, lacks some."""
    if xp is None or xp is np:
        return NUMPY_NAMESPACE
    if library_behind(xp) is CUPY:
        return CUPY_NAMESPACE
    return namespace(xp.empty(0))
