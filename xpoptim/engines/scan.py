"""Reads hundreds of NumPy arrays a step without a microsecond for each.

A step must look at every array anew: an array can be resized or replaced at any time. From Python one
look costs about a microsecond (data pointer, shape, strides, dtype, flags), which for a hundred small arrays is
more than their whole update. So a few lines of machine code look instead. They read the public fields of
NumPy's array object (``PyArrayObject_fields`` of NumPy's C API, the same in all of NumPy 1 and 2), compare them
with what was checked before, and refresh the gradients' pointers. Any difference sends the step back to the
full checks in Python. Where the layout is not as expected, `available` is False and every step is checked in
Python.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np

from .threads import compiling

# Offsets in the array object, behind the 16 bytes that every object of a standard CPython build begins with.
_DATA, _NDIM, _DIMS, _STRIDES, _DESCR, _FLAGS = 16, 24, 32, 40, 56, 64
_WRITEABLE = 0x0400

# context: [columns, leaves, records, lengths, intervals, starts, ends, None, ndarray], nine 64-bit words.
# record of an array: [dtype, flags, ndim, shape and strides, cell of the table, bytes].
# lengths of a leaf: [cell of its length, its length].
_ASSEMBLY = """
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyList_GetItem(ptr, i64)

define i64 @scan(ptr %lists, ptr %context) {
entry:
  %columns = load i64, ptr %context
  %c1 = getelementptr i64, ptr %context, i64 1
  %leaves = load i64, ptr %c1
  %c2 = getelementptr i64, ptr %context, i64 2
  %records = load ptr, ptr %c2
  %c3 = getelementptr i64, ptr %context, i64 3
  %lengths = load ptr, ptr %c3
  %c4 = getelementptr i64, ptr %context, i64 4
  %intervals = load i64, ptr %c4
  %c5 = getelementptr i64, ptr %context, i64 5
  %starts = load ptr, ptr %c5
  %c6 = getelementptr i64, ptr %context, i64 6
  %ends = load ptr, ptr %c6
  %c7 = getelementptr i64, ptr %context, i64 7
  %none = load ptr, ptr %c7
  %c8 = getelementptr i64, ptr %context, i64 8
  %ndarray = load ptr, ptr %c8
  br label %column

column:
  %j = phi i64 [ 0, %entry ], [ %jnext, %columnend ]
  %list = call ptr @PyTuple_GetItem(ptr %lists, i64 %j)
  %isgradient = icmp eq i64 %j, 1
  %firstrecord = mul i64 %j, %leaves
  br label %leaf

leaf:
  %i = phi i64 [ 0, %column ], [ %inext, %leafend ]
  %array = call ptr @PyList_GetItem(ptr %list, i64 %i)
  %number = add i64 %firstrecord, %i
  %word = mul i64 %number, 6
  %record = getelementptr i64, ptr %records, i64 %word
  br i1 %isgradient, label %gradient, label %look

gradient:
  %lengthword = mul i64 %i, 2
  %lengthentry = getelementptr i64, ptr %lengths, i64 %lengthword
  %lengthcell = load ptr, ptr %lengthentry
  %lengthvalue = getelementptr i64, ptr %lengthentry, i64 1
  %length = load i64, ptr %lengthvalue
  %isnone = icmp eq ptr %array, %none
  %now = select i1 %isnone, i64 0, i64 %length
  store i64 %now, ptr %lengthcell
  br i1 %isnone, label %leafend, label %look

look:
  %typeat = getelementptr i8, ptr %array, i64 8
  %type = load ptr, ptr %typeat
  %plain = icmp eq ptr %type, %ndarray
  br i1 %plain, label %fields, label %differs

fields:
  %descrat = getelementptr i8, ptr %array, i64 56
  %descr = load ptr, ptr %descrat
  %wantdescr = load ptr, ptr %record
  %samedescr = icmp eq ptr %descr, %wantdescr
  %flagsat = getelementptr i8, ptr %array, i64 64
  %flags = load i32, ptr %flagsat
  %flags64 = zext i32 %flags to i64
  %r1 = getelementptr i64, ptr %record, i64 1
  %wantflags = load i64, ptr %r1
  %masked = and i64 %flags64, %wantflags
  %sameflags = icmp eq i64 %masked, %wantflags
  %ndimat = getelementptr i8, ptr %array, i64 24
  %ndim = load i32, ptr %ndimat
  %ndim64 = zext i32 %ndim to i64
  %r2 = getelementptr i64, ptr %record, i64 2
  %wantndim = load i64, ptr %r2
  %samendim = icmp eq i64 %ndim64, %wantndim
  %same1 = and i1 %samedescr, %sameflags
  %same2 = and i1 %same1, %samendim
  br i1 %same2, label %axes, label %differs

axes:
  %dimsat = getelementptr i8, ptr %array, i64 32
  %dims = load ptr, ptr %dimsat
  %stridesat = getelementptr i8, ptr %array, i64 40
  %strides = load ptr, ptr %stridesat
  %r3 = getelementptr i64, ptr %record, i64 3
  %want = load ptr, ptr %r3
  br label %axis

axis:
  %k = phi i64 [ 0, %axes ], [ %knext, %axisnext ]
  %left = icmp slt i64 %k, %ndim64
  br i1 %left, label %compare, label %pointer

compare:
  %dimp = getelementptr i64, ptr %dims, i64 %k
  %dim = load i64, ptr %dimp
  %wantdimp = getelementptr i64, ptr %want, i64 %k
  %wantdim = load i64, ptr %wantdimp
  %stridep = getelementptr i64, ptr %strides, i64 %k
  %stride = load i64, ptr %stridep
  %behind = add i64 %k, %ndim64
  %wantstridep = getelementptr i64, ptr %want, i64 %behind
  %wantstride = load i64, ptr %wantstridep
  %samedim = icmp eq i64 %dim, %wantdim
  %samestride = icmp eq i64 %stride, %wantstride
  %sameaxis = and i1 %samedim, %samestride
  br i1 %sameaxis, label %axisnext, label %differs

axisnext:
  %knext = add i64 %k, 1
  br label %axis

pointer:
  %dataat = getelementptr i8, ptr %array, i64 16
  %data = load i64, ptr %dataat
  %r4 = getelementptr i64, ptr %record, i64 4
  %cell = load ptr, ptr %r4
  br i1 %isgradient, label %refresh, label %written

written:
  %was = load i64, ptr %cell
  %unmoved = icmp eq i64 %was, %data
  br i1 %unmoved, label %leafend, label %differs

refresh:
  store i64 %data, ptr %cell
  %r5 = getelementptr i64, ptr %record, i64 5
  %bytes = load i64, ptr %r5
  %dataend = add i64 %data, %bytes
  br label %search

search:
  %low = phi i64 [ 0, %refresh ], [ %low2, %probe ]
  %high = phi i64 [ %intervals, %refresh ], [ %high2, %probe ]
  %open = icmp slt i64 %low, %high
  br i1 %open, label %probe, label %found

probe:
  %sum = add i64 %low, %high
  %middle = lshr i64 %sum, 1
  %endp = getelementptr i64, ptr %ends, i64 %middle
  %end = load i64, ptr %endp
  %before = icmp ule i64 %end, %data
  %above = add i64 %middle, 1
  %low2 = select i1 %before, i64 %above, i64 %low
  %high2 = select i1 %before, i64 %high, i64 %middle
  br label %search

found:
  %exists = icmp slt i64 %low, %intervals
  br i1 %exists, label %overlap, label %leafend

overlap:
  %startp = getelementptr i64, ptr %starts, i64 %low
  %start = load i64, ptr %startp
  %touches = icmp ult i64 %start, %dataend
  br i1 %touches, label %differs, label %leafend

leafend:
  %inext = add i64 %i, 1
  %moreleaves = icmp slt i64 %inext, %leaves
  br i1 %moreleaves, label %leaf, label %columnend

columnend:
  %jnext = add i64 %j, 1
  %morecolumns = icmp slt i64 %jnext, %columns
  br i1 %morecolumns, label %column, label %same

same:
  ret i64 0

differs:
  ret i64 1
}
"""


def _layout_as_expected() -> bool:
    """Whether NumPy's array object looks as described above, read from a few arrays whose fields are known."""
    standard = sys.implementation.name == "cpython" and object.__basicsize__ == 16
    if not standard or ctypes.sizeof(ctypes.c_void_p) != 8 or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    if np.ndarray.__basicsize__ < _FLAGS + 4:
        return False
    whole = np.zeros((3, 5, 7), np.float32)
    frozen = np.zeros(4, np.float16)
    frozen.flags.writeable = False
    return all(_reads_right(a) for a in (whole, whole[1:, ::2], whole.T, frozen, np.float64(1.0) + np.zeros(())))


def _reads_right(array: Any) -> bool:
    if type(array) is not np.ndarray:
        return True

    def word(offset: int) -> int:
        return ctypes.c_int64.from_address(id(array) + offset).value

    def half(offset: int) -> int:
        return ctypes.c_int32.from_address(id(array) + offset).value

    n = array.ndim
    if (word(_DATA), half(_NDIM), word(_DESCR)) != (array.ctypes.data, n, id(array.dtype)):
        return False
    dims = tuple((ctypes.c_int64 * n).from_address(word(_DIMS))) if n else ()
    strides = tuple((ctypes.c_int64 * n).from_address(word(_STRIDES))) if n else ()
    writeable = bool(half(_FLAGS) & _WRITEABLE)
    return (dims, strides, writeable) == (array.shape, array.strides, array.flags.writeable)


@cache
def available() -> bool:
    return _layout_as_expected()


def _function() -> tuple[Any, Any]:
    """The compiled function and the module it lives in."""
    with compiling:
        return _compiled()


@cache
def _compiled() -> tuple[Any, Any]:
    import llvmlite.binding as llvm

    from .jit import Module

    for name in ("PyTuple_GetItem", "PyList_GetItem"):
        address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        llvm.add_symbol(name, address)
    module = Module(_ASSEMBLY, vectorize=False)  # it is in its final form, so compile it quickly
    # PYFUNCTYPE: the interpreter's lock is held, as for any extension module that looks at objects.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object, ctypes.c_void_p)
    return prototype(module.address("scan")), module


class Scanner:
    """Compares columns of arrays (parameters, gradients, then each slot) with what they were when it was made.

    ``cells[column][leaf]`` is the address of the table's cell for that array's pointer, ``lengths[leaf]`` the address
    of the leaf's length and the length. Arrays that are written must stay where they are; gradients
    may be anywhere that no written array is, or None.
    """

    def __init__(self, columns: list[list[Any]], cells: list[list[int]], lengths: list[tuple[int, int]]) -> None:
        leaves = len(columns[0])
        written = [array for j, column in enumerate(columns) if j != 1 for array in column]
        self._axes: list[np.ndarray] = []  # the records hold the addresses of these, and of these dtypes
        self._dtypes: list[np.dtype] = []
        records = np.zeros((len(columns), leaves, 6), np.int64)
        for j, column in enumerate(columns):
            for i, array in enumerate(column):
                if array is not None:
                    records[j, i] = self._record(array, cells[j][i], j != 1)
        spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in written if a.nbytes)
        starts = np.array([start for start, _ in spans], np.int64)
        ends = np.array([end for _, end in spans], np.int64)
        pairs = np.array(lengths, np.int64)
        addresses = [records.ctypes.data, pairs.ctypes.data, len(spans), starts.ctypes.data, ends.ctypes.data]
        self._context = np.array([len(columns), leaves, *addresses, id(None), id(np.ndarray)], np.int64)
        self._kept = (records, pairs, starts, ends)  # the context holds their addresses
        self._at = self._context.ctypes.data
        self._scan, self._module = _function()

    def _record(self, array: Any, cell: int, is_written: bool) -> list[int]:
        axes = np.array([*array.shape, *array.strides], np.int64)
        self._axes.append(axes)
        self._dtypes.append(array.dtype)
        flags = _WRITEABLE if is_written else 0
        return [id(array.dtype), flags, array.ndim, axes.ctypes.data, cell, array.nbytes]

    def unchanged(self, columns: tuple[list[Any], ...]) -> bool:
        """Whether all is as before; the gradients' pointers and the lengths are then up to date."""
        return self._scan(columns, self._at) == 0
