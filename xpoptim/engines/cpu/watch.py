"""Whether NumPy's arrays are what they were when a plan was made.

A step must look at every array anew: an array can be resized or replaced at any time. From Python one look costs half a
microsecond, which for a hundred small arrays is more than their whole update. So the extension looks, and in the usual
case goes on to the kernels in the same call (`Direct`). Any difference sends the step back to the full checks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from ...codegen.llvm.elementwise import HEADER
from ..base import Columns, Made
from . import thread_pool
from .native import Extension

_GRADIENTS = 1  # their column
_WRITEABLE = 0x0400  # NPY_ARRAY_WRITEABLE
_BRIEF = 1 << 18  # elements that are done before another thread has much need of the interpreter's lock


@dataclass
class Table:
    """A plan's table: in the row of a leaf its length, then behind the header the pointers of its arrays."""

    memory: np.ndarray
    rows: list[int]
    lengths: list[int]  # with a gradient; without one it is 0
    copied: Iterable[int]  # the leaves of whose gradient the plan reads a copy

    def length_at(self, leaf: int) -> int:
        """The address of a leaf's length."""
        return self.memory.ctypes.data + self.rows[leaf] * self.memory.strides[0]

    def pointer_at(self, leaf: int, column: int) -> int:
        if column == _GRADIENTS and leaf in self.copied:
            return ctypes.addressof(_NOWHERE)
        return self.length_at(leaf) + 8 * (HEADER + column)


_NOWHERE = ctypes.c_int64()  # for the pointer of an array that no kernel reads


def _spans(columns: Columns) -> list[tuple[int, int]]:
    """Where the arrays that are written begin and end, in order."""
    written = [array for j, column in enumerate(columns) if j != _GRADIENTS for array in column]
    return sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in written if a.nbytes)


class PlainWatch:
    """Looks at the arrays from Python, column by column: a call for each array would take as long as the look."""

    def __init__(self, columns: Columns, table: Table) -> None:
        self._written = [_looks(column) for j, column in enumerate(columns) if j != _GRADIENTS]
        self._layouts = [None if g is None else _layout(g) for g in columns[_GRADIENTS]]
        self._bytes = np.array([0 if g is None else g.nbytes for g in columns[_GRADIENTS]])
        spans = _spans(columns)
        self._starts = np.array([*(start for start, _ in spans), np.iinfo(np.int64).max])  # behind all there is room
        self._ends = np.array([end for _, end in spans], np.int64)
        self._table, self._rows, self._lengths = table.memory, np.array(table.rows), np.array(table.lengths)
        self._read = np.array([leaf not in table.copied for leaf in range(len(table.rows))])

    def unchanged(self, columns: Columns) -> bool:
        written = [column for j, column in enumerate(columns) if j != _GRADIENTS]
        if not all(map(_are_arrays, written)) or [_looks(column) for column in written] != self._written:
            return False
        leaves = [leaf for leaf, g in enumerate(columns[_GRADIENTS]) if g is not None]
        gradients = [columns[_GRADIENTS][leaf] for leaf in leaves]
        if not _are_arrays(gradients) or [*map(_layout, gradients)] != [self._layouts[leaf] for leaf in leaves]:
            return False
        starts = np.array([p if isinstance(p, int) else p[0] for p in _places(gradients)], np.int64)
        behind = np.searchsorted(self._ends, starts, "right")
        if (self._starts[behind] < starts + self._bytes[leaves]).any():
            return False
        moved = self._read[leaves]
        self._table[self._rows, 0] = 0
        self._table[self._rows[leaves], 0] = self._lengths[leaves]
        self._table[self._rows[leaves][moved], HEADER + _GRADIENTS] = starts[moved]
        return True


_layout = attrgetter("dtype", "shape", "strides")
_addressof, _from_buffer = ctypes.addressof, ctypes.c_char.from_buffer


def _are_arrays(column: list[object]) -> bool:
    return {*map(type, column)} <= {np.ndarray}


def _looks(column: list[np.ndarray]) -> list[list[object]]:
    return [[*map(_layout, column)], [*_places(column)]]


def _places(column: list[Any]) -> Sequence[int | tuple[int, bool]]:
    """The addresses; where not all are writable arrays in C order whose dtypes have buffers, some with "read-only"."""
    try:
        return [*map(_addressof, map(_from_buffer, column))]
    except (TypeError, ValueError):
        return [*map(_place, column)]


def _place(array: Any) -> int | tuple[int, bool]:
    try:
        return _addressof(_from_buffer(array))  # in a third of the time
    except (TypeError, ValueError):
        return array.__array_interface__["data"]


class NativeWatch:
    """Looks at the arrays through the extension: ``native.c`` describes the memory that is laid out here."""

    def __init__(self, native: Extension, columns: Columns, keys: list[list[object]], table: Table) -> None:
        self.native, self.columns, leaves = native, len(columns), len(columns[0])
        width = 2 * max((array.ndim for column in columns for array in column if array is not None), default=0)
        axes = np.zeros((len(columns), leaves, width), np.int64)
        records = np.zeros((len(columns), leaves, 6), np.int64)
        for j, column in enumerate(columns):
            for i, array in enumerate(column):
                if array is not None:
                    axes[j, i, : 2 * array.ndim] = [*array.shape, *array.strides]
                    flags = _WRITEABLE if j != _GRADIENTS else 0
                    where = [axes[j, i].ctypes.data, table.pointer_at(i, j)]
                    records[j, i] = [id(array.dtype), flags, array.ndim, *where, array.nbytes]
        lengths = np.array([(table.length_at(i), length) for i, length in enumerate(table.lengths)], np.int64)
        spans = np.array(_spans(columns), np.int64).reshape(-1, 2)
        names = np.array([id(key) for column in keys for key in column], np.int64)
        found = np.zeros(len(columns) * leaves, np.int64)
        memory = (records, lengths, spans, names, found)
        sizes = (len(columns), leaves, len(spans))
        self._watch = np.array([*sizes, *(a.ctypes.data for a in memory)], np.int64)
        self._lists = np.full(len(columns), id(list), np.int64)
        dtypes = [array.dtype for column in columns for array in column if array is not None]
        self._kept = (*memory, axes, table, keys, dtypes)  # whose addresses are in the memory
        self.at, self._lists_at = self._watch.ctypes.data, self._lists.ctypes.data

    def unchanged(self, columns: Columns) -> bool:
        return self.native.same(tuple(columns), self._lists_at, self.at)


class Direct:
    """A whole step as one call: `NativeWatch.unchanged` for the containers themselves, not for lists of what they
    hold, and then the kernels.

    ``container`` is the type of parameters and gradients: dict, list, or ndarray for an array alone. ``inputs`` is
    what the kernels read from.
    """

    def __init__(
        self, watch: NativeWatch, container: type, inputs: Any, calls: thread_pool.Calls, elements: int
    ) -> None:
        kinds = np.full(watch.columns, id(dict), np.int64)
        kinds[:2] = id(container)
        arguments = [ctypes.addressof(inputs), len(inputs), calls.count, calls.at, elements > _BRIEF]
        step = np.array([watch.at, kinds.ctypes.data, *arguments], np.int64)
        self._step, self._at, self._work = watch.native.step, step.ctypes.data, calls.work
        self._kept = (watch, kinds, inputs, calls, step)  # whose addresses are in it

    def run(self, inputs: list[float], containers: tuple[object, ...], made: Made) -> bool:
        """Whether the step was made. It is not if anything may have changed, as when a key is another object.

        ``made`` becomes 1 with the step, for a caller that is interrupted before it is told.
        """
        run = self._step(containers, inputs, self._at, *thread_pool.hired(self._work), ctypes.addressof(made))
        thread_pool.done()
        return run
