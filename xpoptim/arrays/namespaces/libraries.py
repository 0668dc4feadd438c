"""What differs between the libraries that arrays come from, a small class each.

NumPy and CuPy arrays need nothing here but NumPy and CuPy. Arrays of other libraries are array-api-compat's affair,
which is imported when the first of them comes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np

from ..types import Array, CuPyArray, Device, Namespace, Strided
from . import cupy_namespace

NUMPY_NAMESPACE: ModuleType = np  # as it stands, since NumPy 2.1
CUPY_NAMESPACE: ModuleType = cupy_namespace


def memory_at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> np.ndarray | None:
    """Somebody else's memory as an array of bytes, which does not keep it alive; None for no address."""
    if not address:
        return None
    interface = {"data": (address, False), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


_A = TypeVar("_A", bound=Array)


class Library(Generic[_A]):
    """A library of the Array API standard. What it is said to do holds for all of them unless a subclass differs."""

    mutable = True  # whether its arrays can be written to
    unsigned_integers = True  # whether it computes with 64-bit ones
    wrapping_products = False  # whether those multiply modulo 2**64, which the standard leaves open

    def __init__(self, name: str, title: str = "") -> None:
        self.name, self.title = name, title or name

    def namespace(self, x: _A) -> Namespace:
        """The Array API namespace of an array."""
        return compat(x).array_namespace(x)

    def device(self, x: _A) -> Device:
        """Where an array lies: something to compare, and to hand to the namespace's functions."""
        return compat(x).device(x)

    def placement(self, x: _A) -> Device:
        """The device to ask for where something is made beside an array; None where the library sees to that itself."""
        return self.device(x)

    def on(self, device: Device) -> AbstractContextManager[object]:
        """A block that allocates and computes on a device, in libraries that do so on the current one; None is that."""
        return nullcontext()

    def launches(self, device: Device) -> bool:
        """Whether each operation on a device is a launch of a GPU's kernel."""
        return "cuda" in str(device)

    def writable(self, x: _A) -> bool:
        return True

    def plain(self, x: _A) -> Array:
        """The same memory without a subclass, and without a framework's automatic differentiation."""
        return self.without_subclass(x)

    def without_subclass(self, x: _A) -> Array:
        """The same memory as an array of the library's own class."""
        return x

    def extent(self, x: _A) -> np.ndarray | None:
        """A NumPy array in the same place, not to be read; None where the library does not say where an array lies."""
        return None

    def copied(self, x: _A) -> Array:
        """A copy in memory of its own, in the same layout where the library can."""
        return self.namespace(x).asarray(x, copy=True)

    def zeros_like(self, x: _A, dtype: str) -> Array:
        """In the same layout where the library can."""
        xp = self.namespace(x)
        return xp.zeros_like(x, dtype=getattr(xp, dtype))

    def number(self, value: float | complex, like: _A) -> Array:
        """A number as an array beside another, of its dtype."""
        return self.namespace(like).asarray(value, dtype=like.dtype, device=self.device(like))

    def joined(self, re: _A, im: _A) -> Array:
        """Two real arrays as the parts of a complex one. Not ``re + 1j*im``, which makes NaN of an infinite part."""
        xp = self.namespace(re)
        return xp.asarray(_joined(np, np.asarray(re), np.asarray(im)), device=self.device(re))

    def in_float64(self, x: _A) -> tuple[Namespace, Array]:
        """A real array in float64, and its namespace."""
        xp = self.namespace(x)
        return xp, xp.astype(x, xp.float64)

    def read_only(self, x: _A) -> Array:
        """The array as one that cannot be written to, where the library has such a thing."""
        return x

    def shared(self, x: _A, others: list[_A]) -> bool:
        """Whether an array may lie in the memory of one of the others."""
        return True

    def kernels_write(self, x: _A) -> _A:
        """The array, or a copy where its bytes are not in the machine's order."""
        return x

    def wrapped(self, x: _A, given: object) -> object:
        """A new value as what the user gave: as a number, or as an array of its class."""
        return x

    def portable(self, x: _A) -> Array:
        """The array, or a NumPy array in its place where a pickle would forget its device."""
        return x

    def brought(self, x: np.ndarray, like: _A) -> Array:
        """A NumPy array as one of this library beside another."""
        xp = self.namespace(like)
        return xp.asarray(np.array(x), dtype=getattr(xp, x.dtype.name), device=self.device(like))


class _NumPy(Library[np.ndarray]):
    wrapping_products = True

    def namespace(self, x: np.ndarray) -> Namespace:
        return NUMPY_NAMESPACE

    def device(self, x: np.ndarray) -> Device:
        return "cpu"

    def writable(self, x: np.ndarray) -> bool:
        return x.flags.writeable

    def extent(self, x: np.ndarray) -> np.ndarray | None:
        return x

    def without_subclass(self, x: np.ndarray) -> np.ndarray:
        return x if type(x) is np.ndarray else np.asarray(x)

    def read_only(self, x: np.ndarray) -> np.ndarray:
        if isinstance(x, np.generic):  # what arithmetic makes of 0-d arrays, and cannot be written to as it is
            return x
        view = x.view()
        view.flags.writeable = False
        return view

    def shared(self, x: np.ndarray, others: list[np.ndarray]) -> bool:
        return any(np.may_share_memory(x, other) for other in others)

    def kernels_write(self, x: np.ndarray) -> np.ndarray:
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))

    def wrapped(self, x: np.ndarray, given: Any) -> object:
        """Of a subclass as NumPy wraps what it computes from one: ``__array_finalize__`` hands attributes on."""
        if isinstance(given, np.generic):
            return x[()]
        if isinstance(given, float):
            return float(x)
        return x if type(given) is np.ndarray else given.__array_wrap__(x)

    def number(self, value: float | complex, like: np.ndarray) -> np.ndarray:
        return np.array(value)  # a Python float is one of float64


class _CuPy(Library[CuPyArray]):
    """CuPy allocates and computes on the current GPU, wherever the arrays lie that it is given."""

    wrapping_products = True

    def namespace(self, x: CuPyArray) -> Namespace:
        return CUPY_NAMESPACE

    def device(self, x: CuPyArray) -> Device:
        return x.device

    def on(self, device: Device) -> AbstractContextManager[object]:
        return cupy_namespace.on(device)

    def launches(self, device: Device) -> bool:
        return True

    def extent(self, x: CuPyArray) -> np.ndarray | None:
        # Not by __cuda_array_interface__, which may wait for a stream.
        return memory_at(x.data.ptr, x.shape, x.strides, x.itemsize)

    def copied(self, x: CuPyArray) -> CuPyArray:
        with self.on(x.data.device_id):
            return x.copy(order="K")

    def joined(self, re: CuPyArray, im: CuPyArray) -> Array:
        return _joined(cupy_namespace, re, im)

    def portable(self, x: CuPyArray) -> np.ndarray:
        with self.on(x.data.device_id):
            return x.get(order="A")


class _Torch(Library):
    unsigned_integers = False
    wrapping_products = True

    def extent(self, x: Any) -> np.ndarray | None:
        size = x.element_size()
        return memory_at(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size)

    def copied(self, x: Any) -> Array:
        return x.clone()

    def plain(self, x: Any) -> Array:
        return x.detach()

    def joined(self, re: Any, im: Any) -> Array:
        xp: Any = self.namespace(re)
        return xp.complex(re.contiguous(), im.contiguous())


class _JAX(Library[Array]):
    mutable = False

    def placement(self, x: Array) -> Device:
        return None  # under jit a device has no meaning

    def copied(self, x: Array) -> Array:
        return x

    def joined(self, re: Any, im: Any) -> Array:
        import jax

        return jax.lax.complex(re, im)

    def in_float64(self, x: Array) -> tuple[Namespace, Array]:
        wide: np.ndarray = np.asarray(x).astype(np.float64)  # JAX's own may be switched off
        return NUMPY_NAMESPACE, wide


class _Strict(Library):
    wrapping_products = True

    def extent(self, x: Any) -> np.ndarray | None:
        return x._array


NUMPY: Library = _NumPy("numpy", "NumPy")
CUPY: Library = _CuPy("cupy", "CuPy")
_OTHERS: dict[str, Library] = {x.name: x for x in (_Torch("torch"), _JAX("jax", "JAX"), _Strict("array_api_strict"))}


def other(name: str) -> Library:
    """A library that is neither NumPy nor CuPy."""
    return _OTHERS.setdefault(name, Library(name))


def compat(x: object) -> ModuleType:
    """The package array-api-compat."""
    try:
        import array_api_compat
    except ImportError as error:
        raise ImportError(
            f"{type(x).__module__}.{type(x).__qualname__} is of neither NumPy nor CuPy, and arrays of other libraries "
            f"take array-api-compat, which cannot be imported ({error}): pip install array-api-compat"
        ) from error
    return array_api_compat


def _joined(xp: ModuleType, re: Strided, im: Strided) -> Any:
    out = xp.empty(tuple(re.shape), dtype=np.result_type(re.dtype, np.complex64))
    out.real, out.imag = re, im
    return out
