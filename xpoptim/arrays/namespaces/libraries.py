"""What differs between the libraries that arrays come from, a small class each.

NumPy and CuPy arrays need nothing here but NumPy and CuPy. Arrays of other libraries are array-api-compat's affair,
which is imported when the first of them comes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from ..types import Namespace
from . import cupy_namespace

_NUMPY: ModuleType = np  # a type checker takes any module for a namespace
NUMPY_NAMESPACE: Namespace = _NUMPY  # since NumPy 2.1


class _Memory:
    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = interface


def memory_at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> np.ndarray | None:
    """Somebody else's memory as an array of bytes, which does not keep it alive; None for no address."""
    if not address:
        return None
    return np.asarray(_Memory(data=(address, False), shape=shape, strides=strides, typestr=f"|V{itemsize}", version=3))


class Library:
    """A library of the Array API standard. What it is said to do holds for all of them unless a subclass differs."""

    mutable = True  # whether its arrays can be written to
    unsigned_integers = True  # whether it computes with 64-bit ones
    wrapping_products = False  # whether those multiply modulo 2**64, which the standard leaves open

    def __init__(self, name: str, title: str = "") -> None:
        self.name, self.title = name, title or name

    def namespace(self, x: Any) -> Any:
        """The Array API namespace of an array."""
        return compat(x).array_namespace(x)

    def device(self, x: Any) -> Any:
        """Where an array lies: something to compare, and to hand to the namespace's functions."""
        return compat(x).device(x)

    def placement(self, x: Any) -> Any:
        """The device to ask for where something is made beside an array; None where the library sees to that itself."""
        return self.device(x)

    def on(self, device: Any) -> AbstractContextManager[Any]:
        """A block that allocates and computes on a device, in libraries that do so on the current one; None is that."""
        return nullcontext()

    def launches(self, device: Any) -> bool:
        """Whether each operation on a device is a launch of a GPU's kernel."""
        return "cuda" in str(device)

    def writable(self, x: Any) -> bool:
        return True

    def plain(self, x: Any) -> Any:
        """The same memory without a subclass, and without a framework's automatic differentiation."""
        return self.without_subclass(x)

    def without_subclass(self, x: Any) -> Any:
        """The same memory as an array of the library's own class."""
        return x

    def extent(self, x: Any) -> np.ndarray | None:
        """A NumPy array in the same place, not to be read; None where the library does not say where an array lies."""
        return None

    def copied(self, x: Any) -> Any:
        """A copy in memory of its own, in the same layout where the library can."""
        return self.namespace(x).asarray(x, copy=True)

    def zeros_like(self, x: Any, dtype: str) -> Any:
        """In the same layout where the library can."""
        xp = self.namespace(x)
        return xp.zeros_like(x, dtype=getattr(xp, dtype))

    def number(self, value: float | complex, like: Any) -> Any:
        """A number as an array beside another, of its dtype."""
        return self.namespace(like).asarray(value, dtype=like.dtype, device=self.device(like))

    def joined(self, re: Any, im: Any) -> Any:
        """Two real arrays as the parts of a complex one. Not ``re + 1j*im``, which makes NaN of an infinite part."""
        xp = self.namespace(re)
        return xp.asarray(_joined(np, np.asarray(re), np.asarray(im)), device=self.device(re))

    def in_float64(self, x: Any) -> tuple[Any, Any]:
        """A real array in float64, and its namespace."""
        xp = self.namespace(x)
        return xp, xp.astype(x, xp.float64)

    def read_only(self, x: Any) -> Any:
        """The array as one that cannot be written to, where the library has such a thing."""
        return x

    def shared(self, x: Any, others: list[Any]) -> bool:
        """Whether an array may lie in the memory of one of the others."""
        return True

    def kernels_write(self, x: Any) -> Any:
        """The array, or a copy where its bytes are not in the machine's order."""
        return x

    def wrapped(self, x: Any, given: Any) -> Any:
        """A new value as what the user gave: as a number, or as an array of its class."""
        return x

    def portable(self, x: Any) -> Any:
        """The array, or a NumPy array in its place where a pickle would forget its device."""
        return x

    def brought(self, x: np.ndarray, like: Any) -> Any:
        """A NumPy array as one of this library beside another."""
        xp = self.namespace(like)
        return xp.asarray(np.array(x), dtype=getattr(xp, x.dtype.name), device=self.device(like))


class _NumPy(Library):
    wrapping_products = True

    def namespace(self, x: Any) -> Any:
        return NUMPY_NAMESPACE

    def device(self, x: Any) -> Any:
        return "cpu"

    def launches(self, device: Any) -> bool:
        return False

    def writable(self, x: Any) -> bool:
        return x.flags.writeable

    def extent(self, x: Any) -> np.ndarray | None:
        return x

    def without_subclass(self, x: Any) -> Any:
        return x if type(x) is np.ndarray else np.asarray(x)

    def copied(self, x: Any) -> Any:
        return np.array(x, order="K", copy=True)

    def read_only(self, x: Any) -> Any:
        view = x.view()
        view.flags.writeable = False
        return view

    def shared(self, x: Any, others: list[Any]) -> bool:
        return any(np.may_share_memory(x, other) for other in others)

    def kernels_write(self, x: Any) -> Any:
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))

    def wrapped(self, x: Any, given: Any) -> Any:
        """Of a subclass as NumPy wraps what it computes from one: ``__array_finalize__`` hands attributes on."""
        if isinstance(given, np.generic):
            return x[()]
        if isinstance(given, float):
            return float(x)
        return x if type(given) is np.ndarray else given.__array_wrap__(x)

    def zeros_like(self, x: Any, dtype: str) -> Any:
        return np.zeros_like(x, dtype=dtype, order="K")

    def number(self, value: float | complex, like: Any) -> Any:
        return np.array(value)  # a Python float is one of float64

    def joined(self, re: Any, im: Any) -> Any:
        return _joined(np, re, im)

    def brought(self, x: np.ndarray, like: Any) -> Any:
        return x


class _CuPy(Library):
    """CuPy allocates and computes on the current GPU, wherever the arrays lie that it is given."""

    wrapping_products = True

    def namespace(self, x: Any) -> Any:
        return cupy_namespace

    def device(self, x: Any) -> Any:
        return x.device

    def on(self, device: Any) -> AbstractContextManager[Any]:
        import cupy

        return nullcontext() if device is None else cupy.cuda.Device(int(device))

    def launches(self, device: Any) -> bool:
        return True

    def extent(self, x: Any) -> np.ndarray | None:
        # Not by __cuda_array_interface__, which may wait for a stream.
        return memory_at(x.data.ptr, x.shape, x.strides, x.itemsize)

    def copied(self, x: Any) -> Any:
        with self.on(x.data.device_id):
            return x.copy(order="K")

    def joined(self, re: Any, im: Any) -> Any:
        return _joined(cupy_namespace, re, im)

    def portable(self, x: Any) -> Any:
        with self.on(x.data.device_id):
            return x.get(order="A")


class _Torch(Library):
    unsigned_integers = False
    wrapping_products = True

    def extent(self, x: Any) -> np.ndarray | None:
        size = x.element_size()
        return memory_at(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size)

    def copied(self, x: Any) -> Any:
        return x.clone()

    def plain(self, x: Any) -> Any:
        return x.detach()

    def joined(self, re: Any, im: Any) -> Any:
        return self.namespace(re).complex(re.contiguous(), im.contiguous())


class _JAX(Library):
    mutable = False

    def placement(self, x: Any) -> Any:
        return None  # under jit a device has no meaning

    def copied(self, x: Any) -> Any:
        return x

    def joined(self, re: Any, im: Any) -> Any:
        import jax

        return jax.lax.complex(re, im)

    def in_float64(self, x: Any) -> tuple[Any, Any]:
        return np, np.asarray(x).astype(np.float64)  # JAX's own may be switched off


class _Strict(Library):
    wrapping_products = True

    def extent(self, x: Any) -> np.ndarray | None:
        return x._array


NUMPY, CUPY = _NumPy("numpy", "NumPy"), _CuPy("cupy", "CuPy")
_OTHERS = {"torch": _Torch("torch"), "jax": _JAX("jax", "JAX"), "array_api_strict": _Strict("array_api_strict")}


def other(name: str) -> Library:
    """A library that is neither NumPy nor CuPy."""
    return _OTHERS.setdefault(name, Library(name))


def compat(x: Any) -> Any:
    """The package array-api-compat."""
    try:
        import array_api_compat
    except ImportError as error:
        raise ImportError(
            f"{type(x).__module__}.{type(x).__qualname__} is of neither NumPy nor CuPy, and arrays of other libraries "
            f"take array-api-compat, which cannot be imported ({error}): pip install array-api-compat"
        ) from error
    return array_api_compat


def _joined(xp: Any, re: Any, im: Any) -> Any:
    out = xp.empty(tuple(re.shape), dtype=np.result_type(re.dtype, np.complex64))
    out.real, out.imag = re, im
    return out
