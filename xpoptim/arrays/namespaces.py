"""Which library an array is of, its namespace, its device and its dtype's name.

NumPy and CuPy arrays need nothing here but NumPy and CuPy. Arrays of other libraries are array-api-compat's affair,
which is imported when the first of them comes.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import numpy as np

_numpy_name = lru_cache(maxsize=256)(lambda dtype: dtype.name)  # NumPy takes a microsecond to spell it


def namespace_name(x: Any) -> str | None:
    """``"numpy"``, ``"cupy"``, ``"torch"``, ``"jax"``, another namespace's name, or None if ``x`` is no array."""
    if isinstance(x, np.ndarray | np.generic):
        return "numpy"
    if _is_cupy_array(x):
        return "cupy"
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return None
    compat = _compat(x)
    if not compat.is_array_api_obj(x):
        return None
    for name in ("torch", "jax"):
        if getattr(compat, f"is_{name}_array")(x):
            return name
    return compat.array_namespace(x).__name__


def namespace(x: Any) -> Any:
    """The Array API namespace of an array."""
    if isinstance(x, np.ndarray | np.generic):
        return np  # an Array API namespace since NumPy 2.1
    if _is_cupy_array(x):
        return _cupy_namespace()
    return _compat(x).array_namespace(x)


def device_of(x: Any) -> Any:
    """Where an array lies: something to compare, and to hand to its namespace's functions."""
    if isinstance(x, np.ndarray | np.generic):
        return "cpu"
    if _is_cupy_array(x):
        return x.device
    return _compat(x).device(x)


def dtype_name(array: Any) -> str:
    """The dtype as NumPy spells it, whatever the namespace."""
    dtype = array.dtype
    if isinstance(dtype, np.dtype):  # NumPy, CuPy, JAX
        return _numpy_name(dtype)
    return str(dtype).rsplit(".", 1)[-1]  # torch.float32, array_api_strict.float32


def detached(x: Any) -> Any:
    """The same memory outside of a framework's automatic differentiation."""
    return x.detach() if hasattr(x, "detach") else x


def standard(xp: Any) -> Any:
    """A library's own module, or NumPy for None, under the names of the Array API: torch's, for one, lacks some."""
    if xp is None or xp is np:
        return np
    if space_of(xp) == "cupy":
        return _cupy_namespace()
    return namespace(xp.empty(0))


def space_of(xp: Any) -> str:
    """The name, as `namespace_name` has it, of what `namespace` gives."""
    name = getattr(xp, "__name__", "")  # not every namespace is a module
    for space in ("numpy", "cupy", "torch", "jax"):
        if name in (space, f"{space}.numpy", f"array_api_compat.{space}", f"xpoptim.arrays.{space}_namespace"):
            return space
    return name


def _is_cupy_array(x: Any) -> bool:
    cupy = sys.modules.get("cupy")  # nobody has an array of a library that was not imported
    return cupy is not None and isinstance(x, getattr(cupy, "ndarray", ()))


def _cupy_namespace() -> Any:
    from . import cupy_namespace

    return cupy_namespace


def _compat(x: Any) -> Any:
    try:
        import array_api_compat
    except ImportError as error:
        raise ImportError(
            f"{type(x).__module__}.{type(x).__qualname__} is of neither NumPy nor CuPy, and arrays of other libraries "
            f"take array-api-compat, which cannot be imported ({error}): pip install array-api-compat"
        ) from error
    return array_api_compat
