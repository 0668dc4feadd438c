"""Reads hundreds of NumPy arrays a step without a microsecond for each.

A step must look at every array anew: an array can be resized or replaced at any time. From Python one
look costs about a microsecond (data pointer, shape, strides, dtype, flags), which for a hundred small arrays is
more than their whole update. So a few lines of machine code look instead. They read the public fields of
NumPy's array object (``PyArrayObject_fields`` of NumPy's C API, the same in all of NumPy 1 and 2), compare them
with what was checked before, refresh the gradients' pointers and, in the usual case, go on to the kernel in the same
call (`Direct`). Any difference sends the step back to the full checks in Python. Where the layout is not as expected,
`available` is False and every step is checked in Python.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ...codegen.llvm.elementwise import load_fields
from ..base import Columns, Made
from . import thread_pool
from .threads import compiling

# Offsets in the array object, behind the 16 bytes that every object of a standard CPython build begins with.
_DATA, _NDIM, _DIMS, _STRIDES, _DESCR, _FLAGS = 16, 24, 32, 40, 56, 64
_WRITEABLE = 0x0400
_BRIEF = 1 << 18  # elements that are done before another thread has much need of the interpreter's lock

# context: [columns, leaves, records, lengths, intervals, starts, ends, None, ndarray, dict, names, arrays],
# 64-bit fields; arrays: the objects found.
# names: for each array its key, if its column's container is a dict.
# kinds: the type of each column's container, dict or list.
# what: [perform, number of calls, calls, whether to let other threads in]; see `thread_pool`.
# record of an array: [dtype, flags, ndim, shape and strides, cell of the table, bytes].
# lengths of a leaf: [cell of its length, its length].
_CONTEXT = load_fields(
    "context",
    *("i64 columns", "i64 leaves", "ptr records", "ptr lengths", "i64 intervals", "ptr starts", "ptr ends"),
    *("ptr none", "ptr ndarray", "ptr dict", "ptr names", "ptr arrays"),
)
_WHAT = load_fields("what", "ptr perform", "i64 count", "ptr calls", "i64 long")

_ASSEMBLY = f"""
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyList_GetItem(ptr, i64)
declare i64 @PyList_Size(ptr)
declare i64 @PyDict_Size(ptr)
declare i32 @PyDict_Next(ptr, ptr, ptr, ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)
declare ptr @PyMem_RawMalloc(i64)
declare void @PyMem_RawFree(ptr)

define i64 @step(ptr %containers, ptr %context, ptr %kinds, ptr %what, i64 %most, i64 %patience, ptr %made) {{
entry:
  %different = call i64 @scan(ptr %containers, ptr %context, ptr %kinds)
  %isdifferent = icmp ne i64 %different, 0
  br i1 %isdifferent, label %differs, label %compute

compute:
{_WHAT}
  %brief = icmp eq i64 %long, 0
  br i1 %brief, label %locked, label %holds

locked:
  call void %perform(i64 %most, i64 %patience, i64 %count, ptr %calls, ptr %made)
  br label %exit

holds: ; references of our own, and only then are other threads let in
{_CONTEXT}
  %all = mul i64 %columns, %leaves
  %bytes = mul i64 %all, 8
  %mine = call ptr @PyMem_RawMalloc(i64 %bytes) ; not where the next scan writes
  %full = icmp eq ptr %mine, null
  br i1 %full, label %differs, label %hold
hold:
  %h = phi i64 [ 0, %holds ], [ %hnext, %hold ]
  %heldp = getelementptr ptr, ptr %arrays, i64 %h
  %held = load ptr, ptr %heldp
  %minep = getelementptr ptr, ptr %mine, i64 %h
  store ptr %held, ptr %minep
  call void @Py_IncRef(ptr %held)
  %hnext = add i64 %h, 1
  %hmore = icmp slt i64 %hnext, %all
  br i1 %hmore, label %hold, label %unlocked
unlocked:
  %thread = call ptr @PyEval_SaveThread()
  call void %perform(i64 %most, i64 %patience, i64 %count, ptr %calls, ptr %made)
  call void @PyEval_RestoreThread(ptr %thread)
  br label %drop
drop:
  %d = phi i64 [ 0, %unlocked ], [ %dnext, %drop ]
  %droppedp = getelementptr ptr, ptr %mine, i64 %d
  %dropped = load ptr, ptr %droppedp
  call void @Py_DecRef(ptr %dropped)
  %dnext = add i64 %d, 1
  %dmore = icmp slt i64 %dnext, %all
  br i1 %dmore, label %drop, label %free
free:
  call void @PyMem_RawFree(ptr %mine)
  br label %exit

exit:
  ret i64 0

differs:
  ret i64 1
}}

define i64 @scan(ptr %containers, ptr %context, ptr %kinds) {{
entry:
{_CONTEXT}
  %position = alloca i64
  %key = alloca ptr
  %value = alloca ptr
  br label %column

column:
  %j = phi i64 [ 0, %entry ], [ %jnext, %columnend ]
  %container = call ptr @PyTuple_GetItem(ptr %containers, i64 %j)
  %isgradient = icmp eq i64 %j, 1
  %firstrecord = mul i64 %j, %leaves
  %kindat = getelementptr i8, ptr %container, i64 8
  %kind = load ptr, ptr %kindat
  %wantkindat = getelementptr ptr, ptr %kinds, i64 %j
  %wantkind = load ptr, ptr %wantkindat
  %samekind = icmp eq ptr %kind, %wantkind
  br i1 %samekind, label %measure, label %differs

measure:
  %isdict = icmp eq ptr %kind, %dict
  br i1 %isdict, label %measuredict, label %measurelist

measuredict:
  store i64 0, ptr %position
  %dictsize = call i64 @PyDict_Size(ptr %container)
  br label %measured

measurelist:
  %listsize = call i64 @PyList_Size(ptr %container)
  br label %measured

measured:
  %size = phi i64 [ %dictsize, %measuredict ], [ %listsize, %measurelist ]
  %samesize = icmp eq i64 %size, %leaves
  br i1 %samesize, label %leaf, label %differs

leaf:
  %i = phi i64 [ 0, %measured ], [ %inext, %leafend ]
  %gap = phi i64 [ 0, %measured ], [ %gapnext, %leafend ]
  br i1 %isdict, label %fromdict, label %fromlist

fromdict:
  %there = call i32 @PyDict_Next(ptr %container, ptr %position, ptr %key, ptr %value)
  %nameplace = add i64 %firstrecord, %i
  %nameat = getelementptr ptr, ptr %names, i64 %nameplace
  %wantname = load ptr, ptr %nameat
  %name = load ptr, ptr %key
  %samename = icmp eq ptr %name, %wantname
  %dictarray = load ptr, ptr %value
  br i1 %samename, label %found_array, label %differs

fromlist:
  %listarray = call ptr @PyList_GetItem(ptr %container, i64 %i)
  br label %found_array

found_array:
  %array = phi ptr [ %dictarray, %fromdict ], [ %listarray, %fromlist ]
  %number = add i64 %firstrecord, %i
  %arrayp = getelementptr ptr, ptr %arrays, i64 %number
  store ptr %array, ptr %arrayp
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
  %known = icmp slt i64 %gap, %intervals
  br i1 %known, label %guess, label %search

guess: ; gradients tend to lie side by side: between the same two written arrays as the one before
  %abovep = getelementptr i64, ptr %starts, i64 %gap
  %nextabove = load i64, ptr %abovep
  %isbelow = icmp ule i64 %dataend, %nextabove
  %gapbefore = add i64 %gap, -1
  %belowp = getelementptr i64, ptr %ends, i64 %gapbefore
  %nextbelow = load i64, ptr %belowp
  %isabove = icmp ule i64 %nextbelow, %data
  %free = and i1 %isbelow, %isabove
  br i1 %free, label %leafend, label %search

search:
  %low = phi i64 [ 0, %refresh ], [ 0, %guess ], [ %low2, %probe ]
  %high = phi i64 [ %intervals, %refresh ], [ %intervals, %guess ], [ %high2, %probe ]
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
  %gapnext = phi i64 [ %gap, %gradient ], [ %gap, %written ], [ %gap, %guess ], [ %low, %found ], [ %low, %overlap ]
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
}}
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
    return all(_reads_right(a) for a in (whole, whole[1:, ::2], whole.T, frozen, np.zeros(())))


def _reads_right(array: np.ndarray) -> bool:
    if type(array) is not np.ndarray:
        raise TypeError(f"the layout of a {type(array).__name__} says nothing of an array's")

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


@cache
def _compiled() -> Any:
    from .jit import Module

    return Module(_ASSEMBLY, vectorize=False, library=ctypes.pythonapi)


@cache
def _functions() -> tuple[Callable[..., int], Callable[..., int]]:
    """``scan`` and ``step``. PYFUNCTYPE: the interpreter's lock is held, as for any extension module."""
    with compiling:
        module = _compiled()
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    scan = ctypes.PYFUNCTYPE(word, ctypes.py_object, pointer, pointer)
    step = ctypes.PYFUNCTYPE(word, ctypes.py_object, pointer, pointer, pointer, word, word, pointer)
    return scan(module.address("scan")), step(module.address("step"))


_NOWHERE = ctypes.c_int64()


def nowhere() -> int:
    """A cell for the pointer of an array that no kernel reads."""
    return ctypes.addressof(_NOWHERE)


class Scanner:
    """Compares columns of arrays (parameters, gradients, then each slot) with what they were when it was made.

    ``cells[column][leaf]`` is the address of the table's cell for that array's pointer, ``lengths[leaf]`` the address
    of the leaf's length and the length. Arrays that are written must stay where they are; gradients
    may be anywhere that no written array is, or None. ``names[column][leaf]`` is the array's key, where `Direct` will
    look into dicts.
    """

    def __init__(
        self,
        columns: Columns,
        names: list[list[object]],
        cells: list[list[int]],
        lengths: list[tuple[int, int]],
    ) -> None:
        leaves = len(columns[0])
        written = [array for j, column in enumerate(columns) if j != 1 for array in column]
        # The records hold the addresses of these, and of these dtypes.
        width = 2 * max((array.ndim for column in columns for array in column if array is not None), default=0)
        self._axes = np.zeros((len(columns), leaves, width), np.int64)
        self._dtypes: list[np.dtype] = []
        records = np.zeros((len(columns), leaves, 6), np.int64)
        for j, column in enumerate(columns):
            for i, array in enumerate(column):
                if array is not None:
                    records[j, i] = self._record(array, self._axes[j, i], cells[j][i], j != 1)
        spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in written if a.nbytes)
        starts = np.array([start for start, _ in spans], np.int64)
        ends = np.array([0, *(end for _, end in spans)], np.int64)[1:]  # before the first is nothing: it ends at 0
        pairs = np.array(lengths, np.int64)
        keys = np.array([id(name) for column in names for name in column], np.int64)
        addresses = [records.ctypes.data, pairs.ctypes.data, len(spans), starts.ctypes.data, ends.ctypes.data]
        types = [id(None), id(np.ndarray), id(dict)]
        self._found = np.zeros(len(columns) * leaves, np.int64)
        fields = [len(columns), leaves, *addresses, *types, keys.ctypes.data, self._found.ctypes.data]
        self._context = np.array(fields, np.int64)
        self._lists = np.full(len(columns), id(list), np.int64)
        self._kept = (records, pairs, starts, ends, keys, names)  # the context holds their addresses
        self.at, self._lists_at = self._context.ctypes.data, self._lists.ctypes.data
        self.columns = len(columns)
        self._scan, _ = _functions()

    def _record(self, array: np.ndarray, axes: np.ndarray, cell: int, is_written: bool) -> list[int]:
        axes[: 2 * array.ndim] = [*array.shape, *array.strides]
        self._dtypes.append(array.dtype)
        flags = _WRITEABLE if is_written else 0
        return [id(array.dtype), flags, array.ndim, axes.ctypes.data, cell, array.nbytes]

    def unchanged(self, columns: Columns) -> bool:
        """Whether all is as before; the gradients' pointers and the lengths are then up to date."""
        return self._scan(tuple(columns), self.at, self._lists_at) == 0


class Direct:
    """A whole step as one call: `Scanner.unchanged` for the containers themselves, not for lists of what they hold, and
    then the kernel.

    ``container`` is the type of parameters and gradients, dict or list; ``inputs`` are what the kernel reads its from.
    """

    def __init__(self, scanner: Scanner, container: type, inputs: Any, calls: thread_pool.Calls, elements: int) -> None:
        self._scanner, self._inputs, self._calls = scanner, inputs, calls
        self._kinds = np.full(scanner.columns, id(dict), np.int64)
        self._kinds[:2] = id(container)
        self._what = np.array([thread_pool.perform_at(), calls.count, calls.at, elements > _BRIEF], np.int64)
        self._addresses = scanner.at, self._kinds.ctypes.data, self._what.ctypes.data
        _, self._step = _functions()

    def run(self, inputs: Sequence[float], containers: tuple[object, ...], made: Made) -> bool:
        """Whether the step was made. It is not if anything may have changed, as when a key is another object.

        ``made`` is a ``c_int64`` that becomes 1 with the step, for a caller that is interrupted before it is told.
        """
        self._inputs[:] = inputs
        different = self._step(
            containers, *self._addresses, *thread_pool.hired(self._calls.work), ctypes.addressof(made)
        )
        thread_pool.done()
        return different == 0
