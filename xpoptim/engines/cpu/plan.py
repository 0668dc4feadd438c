"""The CPU engine: fused kernels over tables of NumPy arrays.

`kernels` compiles a recipe for one pair of dtypes. A `Plan` lays the arrays of a container out as one table, runs
the kernels over it, and can be run again as long as the arrays are what they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ...arrays.dtypes import PART
from ...arrays.leaves import Leaf
from ...arrays.namespaces.libraries import NUMPY_NAMESPACE, memory_at
from ...codegen.llvm.elementwise import HEADER, assembly
from ...recipe.recipe import Traced
from ...trace.program import Program
from ...trace.sums import CHUNK, fold
from ..base import Columns, Made, Watch
from . import thread_pool, threads
from .native import extension
from .watch import Direct, NativeWatch, PlainWatch, Table

_GRAIN = 1 << 14  # elements of a task at most, a multiple of CHUNK
# So many at least where there are elements enough: what is left when one thread is through is little.
_TASKS = 16
_PIECE = 1 << 16  # elements of a gradient that are copied at a time, a multiple of CHUNK


class Kernel:
    """A program as machine code: ``prologue`` rounds the scalars, ``run`` walks a table of rows. Both are addresses."""

    def __init__(self, program: Program) -> None:
        from .jit import Module

        self._module = Module(assembly(program), subnormals=("prologue", "run"))
        self.prologue, self.run = self._module.address("prologue"), self._module.address("run")
        self.scalars = len(program.scalars)


# Not for ever: a rule that is written again and again, as in a notebook, is another program.
_kernel = lru_cache(maxsize=256)(Kernel)


def kernels(traced: Traced, dtype: str, g_dtype: str) -> dict[str, Kernel]:
    """The compiled passes of a step for one pair of dtypes. Equal programs are compiled once."""
    with threads.compiling:
        return {kind: _kernel(program) for kind, program in traced.programs(dtype, g_dtype).items()}


class _Pass:
    """A kernel with its scalars and its job.

    Their addresses are kept: reading ``array.ctypes.data`` takes longer than a small kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self._scalars = kernel, np.zeros(max(1, kernel.scalars))
        self._cursors = thread_pool.cursors()
        self.scalars_at, self._cursors_at = self._scalars.ctypes.data, self._cursors.ctypes.data
        self.job_at = 0

    def over(self, table: int, rows: int, total: int, sums: int) -> None:
        grain = min(_GRAIN, max(1, total // (_TASKS * CHUNK)) * CHUNK)
        self._job = np.array([self._cursors_at, 0, table, rows, self.scalars_at, grain, total, sums], np.int64)
        self.job_at = self._job.ctypes.data

    def call(self, inputs: int) -> list[int]:
        """For `thread_pool.Calls`."""
        return [self.kernel.prologue, inputs, self.scalars_at, self.kernel.run, self.job_at]


@dataclass
class _Group:
    """The rows of one pair of dtypes: consecutive in the table, one job for each pass."""

    passes: dict[str, _Pass]
    leaves: list[int]
    first: int  # its first row
    start: int  # where its elements begin in the line of all rows, padded to whole chunks
    total: int  # the length of that line
    elements: int  # the true number of elements


class Plan:
    """A table over the arrays of fused leaves, and the calls that run it.

    It holds addresses, not arrays: whoever runs it keeps the arrays alive.
    """

    devices: Sequence[int] = ()
    keeps_sums = False  # the host adds them up

    def __init__(self, traced: Traced, leaves: list[Leaf[np.ndarray]]) -> None:
        self.recipe = traced.recipe
        threads.get_num_threads()  # a bad XPOPTIM_NUM_THREADS is an error now, before anything is written,
        extension()  # and so is a bad XPOPTIM_NATIVE
        columns = 2 + len(self.recipe.slots)
        self._keys = [leaf.key for leaf in leaves]
        self._table = np.zeros((len(leaves), HEADER + columns), np.int64)
        self._row_bytes = self._table.strides[0]
        self._groups: list[_Group] = []
        self._rows = [0] * len(leaves)
        self._starts = [0] * len(leaves)
        self._lengths = [0] * len(leaves)
        by_dtypes: dict[tuple[str, str], list[int]] = {}
        for i, leaf in enumerate(leaves):
            by_dtypes.setdefault((leaf.dtype, leaf.g_dtype or leaf.dtype), []).append(i)
        row = start = 0
        for (dtype, g_dtype), members in by_dtypes.items():
            passes = {kind: _Pass(kernel) for kind, kernel in kernels(traced, dtype, g_dtype).items()}
            first, begin = row, start
            for i in members:
                self._fill(row, start - begin, i, leaves[i])
                self._starts[i] = start
                start += -(-self._lengths[i] // CHUNK) * CHUNK
                row += 1
            elements = sum(self._lengths[i] for i in members)
            self._groups.append(
                _Group(passes, members, first=first, start=begin, total=start - begin, elements=elements)
            )
        self._sums = np.zeros(start // CHUNK + 1)
        self._first_chunks = np.array(self._starts, np.int64) // CHUNK
        self._long = [i for i, length in enumerate(self._lengths) if length > CHUNK]
        self._odd = {
            i: (x.g.shape, x.g.strides, x.g.dtype)
            for i, x in enumerate(leaves)
            if x.g is not None and not x.g.flags.c_contiguous
        }
        self._inputs: Any = (ctypes.c_double * len(self.recipe.inputs))()
        self._inputs_at = ctypes.addressof(self._inputs)
        for group in self._groups:
            table = self._table.ctypes.data + group.first * self._row_bytes
            sums = self._sums.ctypes.data + group.start // CHUNK * 8
            for one in group.passes.values():
                one.over(table, len(group.leaves), group.total, sums)
        busy = [group for group in self._groups if group.elements]
        self._elements = sum(group.elements for group in busy)
        largest = max((group.elements for group in busy), default=0)
        self._calls = {
            kind: thread_pool.Calls([group.passes[kind].call(self._inputs_at) for group in busy], largest)
            for kind in (("norm", "update") if self.recipe.reductions else ("update",))
        }

    def _fill(self, row: int, start: int, i: int, leaf: Leaf[np.ndarray]) -> None:
        length = leaf.p.size * (2 if leaf.dtype in PART else 1)  # a complex array is its parts in turn
        self._rows[i], self._lengths[i] = row, length
        pointers = [a.ctypes.data if a is not None else 0 for a in (leaf.p, leaf.g, *leaf.slots)]
        self._table[row] = [length if leaf.g is not None else 0, start, 0, *pointers]

    # Running

    def set_inputs(self, inputs: Sequence[float]) -> None:
        self._inputs[: len(inputs)] = inputs

    def run(self, kind: str, made: Made) -> None:
        if kind == "norm":
            self._add_up()
        else:
            self._calls[kind].run(made)

    def _add_up(self) -> None:
        """The chunk sums of all gradients. Those that do not lie in C order are visited on their own."""
        unseen = ctypes.c_int64()
        if not self._odd:
            self._calls["norm"].run(unseen)
            return
        skipped = [(self._rows[i], self._table[self._rows[i], 0]) for i in self._odd]
        for row, _ in skipped:
            self._table[row, 0] = 0
        self._calls["norm"].run(unseen)
        for row, length in skipped:
            self._table[row, 0] = length
        for i, (shape, strides, dtype) in self._odd.items():
            row = self._table[self._rows[i]]
            g = memory_at(int(row[HEADER + 1]), shape, strides, dtype.itemsize)
            if row[0] and g is not None:
                self._add_up_odd(i, g.view(dtype), self._chunks(i, int(row[0])))

    def sums(self) -> dict[str, float]:
        lengths = self._table[self._rows, 0]
        sums = self._sums[self._first_chunks]
        sums[lengths == 0] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for i in self._long:
                if lengths[i]:
                    sums[i] = fold(NUMPY_NAMESPACE, self._chunks(i, int(lengths[i])))
        return dict(zip(self._keys, sums.tolist(), strict=True))

    def _chunks(self, i: int, length: int) -> np.ndarray:
        first = self._first_chunks[i]
        return self._sums[first : first - (-length // CHUNK)]

    def _add_up_odd(self, i: int, g: np.ndarray, chunks: np.ndarray) -> None:
        """Chunk sums of a gradient in logical C order, whatever its layout, through a small buffer."""
        group = next(group for group in self._groups if i in group.leaves)
        norm = _Pass(group.passes["norm"].kernel)
        row = self._table[self._rows[i]].copy()
        step = _PIECE // (2 if np.iscomplexobj(g) else 1)
        for n, at in enumerate(range(0, g.size, step)):
            piece = g.flat[at : at + step]
            count = piece.size * (_PIECE // step)
            row[0], row[1], row[HEADER + 1] = count, 0, piece.ctypes.data
            out = chunks[n * (_PIECE // CHUNK) :]
            norm.over(row.ctypes.data, 1, _PIECE, out.ctypes.data)
            thread_pool.Calls([norm.call(self._inputs_at)], count).run(ctypes.c_int64())

    # Running again

    def watch(self, columns: Columns, keys: list[list[object]], copied: Iterable[int]) -> NativeWatch | PlainWatch:
        table, native = Table(self._table, self._rows, self._lengths, copied), extension()
        return PlainWatch(columns, table) if native is None else NativeWatch(native, columns, keys, table)

    def direct(self, watch: Watch, container: type) -> Direct | None:
        known = container in (dict, list, np.ndarray)
        if not known or self._calls.keys() != {"update"} or not isinstance(watch, NativeWatch):
            return None
        return Direct(watch, container, self._inputs, self._calls["update"], self._elements)
