"""How arrays lie in memory: layouts, overlaps, copies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from .namespaces.lookup import library_of
from .types import Strided


def dense_alike(arrays: Sequence[Strided]) -> bool:
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


def extent(x: object) -> np.ndarray | None:
    """An array whose memory can be compared with `overlap`; None where the library does not say where it lies."""
    library = library_of(x)
    return None if library is None else library.extent(x)


_EFFORT: Any = 100_000  # of the exact search; NumPy types it as one of two constants


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays share an element's memory. Exact within a bounded effort; what is not settled counts."""
    try:
        return np.shares_memory(a, b, max_work=_EFFORT)
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(x: object) -> bool:
    """True unless the strides nest, as those of every slice, transpose or reshape of an ordinary array do."""
    place = extent(x)
    if place is None or not place.size:
        return False
    reach = place.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(place.strides, place.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def overlapping_pair(arrays: list[tuple[str, np.ndarray]]) -> tuple[str, str] | None:
    """The names of two arrays that share memory, if any do."""
    spans = sorted((*byte_bounds(a), i) for i, (_, a) in enumerate(arrays) if a.size)
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
        self._spans = sorted(((*byte_bounds(a), i) for i, a in enumerate(arrays) if a.size), key=lambda s: s[0])
        self._arrays = arrays
        self._longest = max((high - low for low, high, _ in self._spans), default=0)
        self._starts = [low for low, _, _ in self._spans]

    def touches(self, g: np.ndarray) -> bool:
        if not g.size:
            return False
        low, high = byte_bounds(g)
        near = slice(bisect_left(self._starts, low - self._longest), bisect_left(self._starts, high))
        return any(end > low and overlap(self._arrays[i], g) for _, end, i in self._spans[near])
