"""How arrays lie in memory: layouts, overlaps, copies."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .namespaces import namespace, namespace_name, space_of


def dense_alike(arrays: list[Any]) -> bool:
    """Whether strided arrays fill their memory without gaps, and all in the same order.

    Axes of length 1 do not count. Then element i in memory is the same element in each.
    """
    first = arrays[0]
    if all(a.flags.c_contiguous for a in arrays) or all(a.flags.f_contiguous for a in arrays):
        return True
    shape = first.shape
    axes = [k for k in range(len(shape)) if shape[k] != 1]
    steps = [tuple(a.strides[k] // a.itemsize if a.itemsize else 0 for k in axes) for a in arrays]
    if any(step != steps[0] for step in steps) or any(a.strides[k] % a.itemsize for a in arrays for k in axes):
        return False
    expected = 1
    for step, length in sorted((steps[0][j], shape[k]) for j, k in enumerate(axes)):
        if step != expected:
            return False
        expected *= length
    return True


class _Extent:
    """The memory of an array as NumPy sees it: an address with shape and strides, never dereferenced."""

    def __init__(self, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "data": (pointer, False),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
            "version": 3,
        }


def extent(x: Any) -> np.ndarray | None:
    """An array whose memory can be compared with `overlap`; None where the library does not say where it lies."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "data_ptr"):  # torch
        size = x.element_size()
        return _extent(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size)
    if hasattr(getattr(x, "data", None), "ptr"):  # CuPy; its __cuda_array_interface__ may wait for a stream
        return _extent(x.data.ptr, x.shape, x.strides, x.itemsize)
    inner = getattr(x, "_array", None)  # array-api-strict
    return inner if isinstance(inner, np.ndarray) else None


def _extent(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> np.ndarray | None:
    return np.asarray(_Extent(pointer, shape, strides, itemsize)) if pointer else None


_EFFORT: Any = 100_000  # of the exact search; NumPy types it as one of two constants


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays share an element's memory. Exact within a bounded effort; what is not settled counts."""
    try:
        return np.shares_memory(a, b, max_work=_EFFORT)
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(x: Any) -> bool:
    """True unless the strides nest, as those of every slice, transpose or reshape of an ordinary array do."""
    if hasattr(x, "stride"):  # torch counts strides in elements
        strides, reach = x.stride(), 1
    else:
        strides, reach = getattr(x, "strides", None), getattr(x, "itemsize", 1)
    if strides is None or 0 in x.shape:
        return False
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def bounds(a: np.ndarray) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(a)


def overlapping_pair(arrays: list[tuple[str, np.ndarray]]) -> tuple[str, str] | None:
    """The names of two arrays that share memory, if any do."""
    spans = sorted((*bounds(a), i) for i, (_, a) in enumerate(arrays) if a.size)
    active: list[tuple[int, int]] = []
    for low, high, i in spans:
        active = [(end, j) for end, j in active if end > low]
        for _, j in active:
            if overlap(arrays[i][1], arrays[j][1]):
                first, second = sorted((i, j))
                return arrays[first][0], arrays[second][0]
        active.append((high, i))
    return None


class Written:
    """The memory that a step writes, for the question whether a gradient lies in it."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._spans = sorted(((*bounds(a), i) for i, a in enumerate(arrays) if a.size), key=lambda s: s[0])
        self._arrays = arrays
        self._longest = max((high - low for low, high, _ in self._spans), default=0)
        self._starts = [low for low, _, _ in self._spans]

    def touches(self, g: np.ndarray) -> bool:
        if not g.size or not self._spans:
            return False
        low, high = bounds(g)
        first = bisect_left(self._starts, low - self._longest)
        for start, end, i in self._spans[first:]:
            if start >= high:
                return False
            if end > low and overlap(self._arrays[i], g):
                return True
        return False


def copied(x: Any) -> Any:
    """A copy in memory of its own, in the same layout where the library can."""
    if isinstance(x, np.ndarray):
        return np.array(x, order="K", copy=True)
    if hasattr(x, "clone"):
        return x.clone()
    space = namespace_name(x)
    if space == "jax":
        return x
    if space == "cupy":
        from ..engines.cuda import driver

        return driver.copied(x)
    return namespace(x).asarray(x, copy=True)


def beside(x: Any) -> AbstractContextManager[Any]:
    """A block in which CuPy, which allocates and computes on the current GPU, does so on the array's own."""
    if isinstance(x, np.ndarray) or namespace_name(x) != "cupy":
        return nullcontext()
    from ..engines.cuda import driver

    return driver.beside(x)


def on_device(xp: Any, device: Any) -> AbstractContextManager[Any]:
    """The same for a device of a namespace; None is the current one."""
    if device is None or space_of(xp) != "cupy":
        return nullcontext()
    from ..engines.cuda import driver

    return driver.on(int(device))
