"""The CPU engine: fused kernels over tables of NumPy arrays.

`kernel` compiles a recipe for one pair of dtypes. A `Plan` lays the arrays of a container out as one table, runs
the kernels over it, and can be run again as long as the arrays are what they were.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..fusion.dtypes import PART
from ..fusion.llvm import HEADER, assembly
from ..fusion.norm import CHUNK, fold
from ..fusion.program import Program
from ..leaves import Leaf
from ..memory import dense_alike
from ..recipe import Recipe
from . import threads

# Below this many elements a second thread costs more (waking it takes about 50 µs) than it gains.
_WORTH_THREADS = 1 << 18
_GRAIN = 1 << 16  # elements of a task, a multiple of CHUNK


class Kernel:
    """A program as machine code: ``prologue`` rounds the scalars, ``run`` walks a table of rows."""

    def __init__(self, program: Program) -> None:
        from .jit import Module

        self._module = Module(assembly(program), subnormals=("prologue", "run"))
        pointer, word = ctypes.c_void_p, ctypes.c_int64
        self.prologue = ctypes.CFUNCTYPE(None, pointer, pointer)(self._module.address("prologue"))
        # ctypes lets go of the interpreter's lock during a call, so that several threads compute.
        run = ctypes.CFUNCTYPE(None, pointer, word, pointer, pointer, word, word, pointer)
        self.run = run(self._module.address("run"))
        self.scalars = len(program.scalars)


@lru_cache(maxsize=256)  # not for ever: a class that is defined again and again, as in a notebook, is another recipe
def _kernel(recipe: Recipe, dtype: str, g_dtype: str, kind: str) -> Kernel:
    return Kernel(recipe.programs(dtype, g_dtype)[kind])


def kernels(recipe: Recipe, dtype: str, g_dtype: str) -> dict[str, Kernel]:
    """The compiled passes of a step for one pair of dtypes; compiled once for each recipe."""
    with threads.compiling:
        return {kind: _kernel(recipe, dtype, g_dtype, kind) for kind in _passes(recipe)}


def _passes(recipe: Recipe) -> tuple[str, ...]:
    return ("norm", "update") if recipe.reductions else ("update",)


def obstacle(leaf: Leaf) -> str:
    """Why a leaf cannot take the fused path, or an empty string."""
    arrays = [leaf.p, *([leaf.g] if leaf.g is not None else []), *leaf.slots]
    if any(not a.dtype.isnative for a in arrays):
        return "its bytes are not in the machine's order"
    if leaf.g is not None and leaf.dtype in PART and leaf.g_dtype not in PART:
        return f"its gradient is real ({leaf.g_dtype}) and it is complex"
    if "float16" in (leaf.dtype, leaf.g_dtype):
        from .jit import half_precision

        if not half_precision():
            return "this CPU has no instructions for float16"
    if not dense_alike(arrays):
        if not dense_alike([leaf.p]):
            return f"the parameter is not dense (shape {leaf.p.shape}, strides {leaf.p.strides})"
        return "gradient and parameter differ in layout: strides " + " and ".join(
            str(a.strides) for a in (leaf.g, leaf.p) if a is not None
        )
    return ""


@dataclass
class _Group:
    """The rows of one pair of dtypes: consecutive in the table, one call of a kernel."""

    kernels: dict[str, Kernel]
    leaves: list[int]
    first: int  # its first row
    start: int  # where its elements begin in the line of all rows, padded to whole chunks
    total: int  # the length of that line
    elements: int  # the true number of elements
    scalars: dict[str, np.ndarray]
    scalars_at: dict[str, int]


class Plan:
    """A table over the arrays of fused leaves, and the calls that run it.

    It holds addresses, not arrays: whoever calls `run` keeps the arrays alive.
    """

    def __init__(self, recipe: Recipe, leaves: list[Leaf]) -> None:
        threads.get_num_threads()  # a bad XPOPTIM_NUM_THREADS is an error now, before anything is written
        self._count = len(leaves)
        columns = 2 + len(recipe.slots)
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
            group = self._group(kernels(recipe, dtype, g_dtype), members, row, start)
            for i in members:
                self._fill(row, start - group.start, i, leaves[i])
                self._starts[i] = start
                start += -(-self._lengths[i] // CHUNK) * CHUNK
                row += 1
            group.total = start - group.start
            group.elements = sum(self._lengths[i] for i in members)
            self._groups.append(group)
        self._sums = np.zeros(start // CHUNK + 1)
        self._first_chunks = np.array(self._starts, np.int64) // CHUNK
        self._long = [i for i, length in enumerate(self._lengths) if length > CHUNK]
        self._inputs = np.zeros(len(recipe.inputs))
        self._cursor = np.zeros(1, np.int64)
        # Asking an array for its address takes longer than a small kernel: ask once.
        self._table_at, self._sums_at = self._table.ctypes.data, self._sums.ctypes.data
        self._inputs_at, self._cursor_at = self._inputs.ctypes.data, self._cursor.ctypes.data

    def _group(self, compiled: dict[str, Kernel], members: list[int], row: int, start: int) -> _Group:
        scalars = {kind: np.zeros(max(1, kernel.scalars)) for kind, kernel in compiled.items()}
        at = {kind: array.ctypes.data for kind, array in scalars.items()}
        return _Group(compiled, members, row, start, 0, 0, scalars, at)

    def _fill(self, row: int, start: int, i: int, leaf: Leaf) -> None:
        length = leaf.p.size * (2 if leaf.dtype in PART else 1)  # a complex array is its parts in turn
        self._rows[i], self._lengths[i] = row, length
        pointers = [a.ctypes.data if a is not None else 0 for a in (leaf.p, leaf.g, *leaf.slots)]
        self._table[row] = [length if leaf.g is not None else 0, start, 0, *pointers]

    def cells(self) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The addresses of the pointers, column by column, and of the lengths, for `scan.Scanner`."""
        base, width = self._table.ctypes.data, self._row_bytes
        columns = [
            [base + row * width + 8 * (HEADER + column) for row in self._rows]
            for column in range(self._table.shape[1] - HEADER)
        ]
        return columns, [(base + row * width, length) for row, length in zip(self._rows, self._lengths, strict=True)]

    def squares(self, inputs: list[float], odd: dict[int, Any]) -> np.ndarray:
        """The sum of squares of each leaf's loaded gradient, in the leaves' order.

        ``odd`` holds the gradients that do not lie in C order; they are visited through copies of a piece at a time.
        """
        self._inputs[: len(inputs)] = inputs
        skipped = [(self._rows[i], self._table[self._rows[i], 0]) for i in odd]
        for row, _ in skipped:
            self._table[row, 0] = 0
        for group in self._groups:
            self._call(group, "norm")
        for row, length in skipped:
            self._table[row, 0] = length
        lengths = self._table[self._rows, 0]
        for i, g in odd.items():
            if lengths[i]:
                self._odd_chunks(i, g, self._chunks(i, int(lengths[i])))
        sums = self._sums[self._first_chunks]
        sums[lengths == 0] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for i in self._long:
                if lengths[i]:
                    sums[i] = fold(np, self._chunks(i, int(lengths[i])))
        return sums

    def _chunks(self, i: int, length: int) -> np.ndarray:
        first = self._first_chunks[i]
        return self._sums[first : first - (-length // CHUNK)]

    def _odd_chunks(self, i: int, g: Any, chunks: np.ndarray) -> None:
        """Chunk sums of a gradient in logical C order, whatever its layout, through a small buffer."""
        group = next(group for group in self._groups if i in group.leaves)
        kernel, scalars = group.kernels["norm"], group.scalars_at["norm"]
        row = self._table[self._rows[i]].copy()
        step = _GRAIN // (2 if np.iscomplexobj(g) else 1)
        for n, at in enumerate(range(0, g.size, step)):
            piece = g.flat[at : at + step]
            count = piece.size * (_GRAIN // step)
            row[0], row[1], row[HEADER + 1] = count, 0, piece.ctypes.data
            out = chunks[n * (_GRAIN // CHUNK) :]
            cursor = np.zeros(1, np.int64)
            kernel.run(row.ctypes.data, 1, scalars, cursor.ctypes.data, _GRAIN, _GRAIN, out.ctypes.data)

    def run(self, inputs: list[float]) -> None:
        """Update every leaf."""
        self._inputs[:] = inputs
        for group in self._groups:
            self._call(group, "update")

    def _call(self, group: _Group, kind: str) -> None:
        if not group.elements:
            return
        kernel, scalars = group.kernels[kind], group.scalars_at[kind]
        kernel.prologue(self._inputs_at, scalars)
        table = self._table_at + group.first * self._row_bytes
        sums = self._sums_at + group.start // CHUNK * 8
        self._cursor[0] = 0
        workers = threads.get_num_threads() if group.elements >= _WORTH_THREADS else 1
        grain = _GRAIN if workers > 1 else group.total
        arguments = (table, len(group.leaves), scalars, self._cursor_at, grain, group.total, sums)
        if workers == 1:
            kernel.run(*arguments)
        else:
            workers = min(workers, math.ceil(group.total / grain))
            threads.run(lambda: kernel.run(*arguments), workers)
