"""Looks whether CuPy arrays are what they were at the step before, and refreshes the pointers of the gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..base import Columns


class Watch:
    """Compares CuPy arrays with what they were: places, shapes, strides, dtypes. Gradients may have moved.

    Slots are the optimizer's own: of them it is enough that they are the same objects.
    """

    def __init__(self, refresh: Callable[[list[int]], None], columns: Columns) -> None:
        params, grads, *slots = columns
        self._refresh, self._slots = refresh, slots
        self._layouts = [_layouts(params), _layouts(grads)]
        self._params, self._grads = _addresses(params), _addresses(grads)
        spans = sorted((a.data.ptr, a.data.ptr + a.nbytes) for column in (params, *slots) for a in column if a.nbytes)
        self._starts = np.array([start for start, _ in spans], np.uint64)
        self._ends = np.array([end for _, end in spans], np.uint64)
        self._sizes = np.array([0 if a is None else a.nbytes for a in grads], np.uint64)

    def unchanged(self, columns: Columns) -> bool:
        """Whether all arrays are as before, gradients anywhere; the plan's addresses are then up to date."""
        params, grads, *slots = columns
        if any(any(map(operator.is_not, now, was)) for now, was in zip(slots, self._slots, strict=True)):
            return False
        try:
            if [_layouts(params), _layouts(grads)] != self._layouts or _addresses(params) != self._params:
                return False
            moved = _addresses(grads)
        except AttributeError:  # no CuPy array
            return False
        if moved == self._grads:
            return True
        if self._overlaps(moved):
            return False
        self._refresh(moved)
        self._grads = moved
        return True

    def _overlaps(self, gradients: list[int]) -> bool:
        """Whether a gradient lies in memory that is written; the written spans are apart and sorted."""
        if not self._ends.size:
            return False
        starts = np.array(gradients, np.uint64)
        at = np.searchsorted(self._ends, starts, side="right")  # the first span that ends behind the gradient's start
        inside = (at < self._ends.size) & (self._sizes > 0)
        return bool((self._starts[np.minimum(at, self._ends.size - 1)] < starts + self._sizes)[inside].any())


def _addresses(column: list[Any]) -> list[int]:
    return [0 if a is None else a.data.ptr for a in column]


def _layouts(column: list[Any]) -> list[Any]:
    return [None if a is None else (a.shape, a.strides, a.dtype, a.data.device_id) for a in column]
