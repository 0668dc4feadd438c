"""The reference engine: a program carried out operation by operation on any Array API namespace.

It defines what the fused engines must give. Each array operation makes a new array; nothing is clever here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from ..arrays.dtypes import COMPLEX_DTYPES, PART, compute_dtype
from ..arrays.leaves import Leaf
from ..arrays.namespaces.lookup import beside, device_of, dtype_name, namespace
from ..arrays.types import Array, Device, DType, Namespace
from ..recipe.recipe import Recipe, Traced
from ..trace.language import Functions, Value, among_arrays, scalar_arguments
from ..trace.ops import BOOL, TABLE, Op, Type
from ..trace.program import Program
from ..trace.scalars import evaluate
from ..trace.sums import chunk_sums, fold
from . import base
from .base import Engine, Keeper, Made

_R = TypeVar("_R")
_Raw: TypeAlias = Array | np.float64 | np.bool_ | int


class Eager:
    """The backend of plain rules, which carries out at once: scalars in float64 on the host, arrays where they are."""

    def __init__(self, rule: str, xp: Namespace, dtype: DType, device: Device) -> None:
        self.rule, self.xp, self.dtype, self.device = rule, xp, dtype, device

    def constant(self, value: float | bool) -> _Raw:
        return np.bool_(value) if isinstance(value, bool) else np.float64(value)

    def word(self, value: int) -> _Raw:
        return value

    def operation(self, op: Op, args: list[_Raw], *, scalar: bool) -> _Raw:
        return op.array(np, *args)[()] if scalar else op.array(self.xp, *args)  # np.where makes an array of a scalar

    def spread(self, scalar: _Raw, type: Type) -> Array:
        if type is BOOL:
            return self.xp.asarray(bool(scalar), device=self.device)
        return self.xp.asarray(float(scalar), dtype=self.dtype, device=self.device)


class Plan(base.Plan):
    """Carries the passes out leaf by leaf, on arrays of any library."""

    def __init__(self, traced: Traced, leaves: list[Leaf]) -> None:
        self._traced, self._leaves = traced, leaves
        self._inputs: Sequence[float] = ()
        self._sums: dict[str, float] = {}

    def set_inputs(self, inputs: Sequence[float]) -> None:
        self._inputs = inputs

    def run(self, kind: str, made: Made) -> None:
        if kind == "norm":
            self._sums = {leaf.key: self._beside(_squares_sum, leaf) for leaf in self._leaves}
            return
        # A rule, or the library, may raise for any leaf: all are computed before the first write.
        results = [self._beside(_computed, leaf) for leaf in self._leaves]
        made.value = 1
        try:
            self._write(results)
        except BaseException:  # a signal handler's: once again, which gives the same
            self._write(results)
            raise

    def _write(self, results: list[list[Array]]) -> None:
        for leaf, new in zip(self._leaves, results, strict=True):
            with beside(leaf.p):
                _write(leaf, new)

    def _beside(self, function: Callable[[Traced, Leaf, Sequence[float]], _R], leaf: Leaf) -> _R:
        with beside(leaf.p):
            return function(self._traced, leaf, self._inputs)

    def sums(self) -> dict[str, float]:
        return self._sums


class _Reference(Engine):
    def plan(self, traced: Traced, leaves: list[Leaf], keeper: Keeper | None, *, capturable: bool, alone: bool) -> Plan:
        return Plan(traced, leaves)


ENGINE: Engine = _Reference()


def _computed(traced: Traced, leaf: Leaf, inputs: Sequence[float]) -> list[Array]:
    """The leaf's new parameter and slots, in the compute dtype."""
    xp, recipe = namespace(leaf.p), traced.recipe
    program = traced.programs(leaf.dtype, leaf.g_dtype).get("update")
    with np.errstate(all="ignore"):
        parts = [
            _stored(program, xp, arrays, inputs) if program else _plain(recipe, xp, arrays, leaf.dtype, inputs)
            for arrays in _parts(xp, leaf)
        ]
        return [new[0] if len(new) == 1 else leaf.library.joined(*new) for new in zip(*parts, strict=True)]


def _write(leaf: Leaf, new: list[Array]) -> None:
    """Write what was computed, or put new arrays in the place of immutable ones."""
    xp = namespace(leaf.p)
    with np.errstate(all="ignore"):
        leaf.p = _put(xp, leaf.p, new[0], leaf.mutable)
        leaf.slots = [_put(xp, old, value, leaf.mutable) for old, value in zip(leaf.slots, new[1:], strict=True)]


def _stored(program: Program, xp: Namespace, arrays: list[Array], inputs: Sequence[float]) -> list[Array]:
    """What a program stores, for one real array with its gradient and slots, in the compute dtype."""
    stored = [node for _, node in program.stores]
    known = _carried_out(program, xp, arrays, inputs, stored)
    return [_apart(xp, known[node], arrays, handed_through=program.nodes[node].op == "buffer") for node in stored]


def _apart(xp: Namespace, new: Array, arrays: list[Array], *, handed_through: bool) -> Array:
    """A new value in the arrays' shape. An input handed through is copied: it may be written before it is read."""
    return xp.broadcast_to(xp.asarray(new, copy=True) if handed_through else new, tuple(arrays[0].shape))


def _carried_out(
    program: Program, xp: Namespace, arrays: list[Array], inputs: Sequence[float], wanted: list[int]
) -> dict[int, Array]:
    """The wanted nodes of a program as arrays: one operation after the other, each array dropped after its last use."""
    compute, device = getattr(xp, program.compute), device_of(arrays[0])
    scalars = dict(zip(program.scalars, evaluate(program, inputs), strict=True))
    steps = program.array_steps
    last = {operand: number for number, node in steps for operand in node.args}
    known: dict[int, Array] = {}
    for number, node in steps:
        if node.op == "buffer":
            known[number] = xp.astype(arrays[node.index], compute, copy=False)
        elif node.op == "spread":
            value = scalars.get(node.args[0], program.nodes[node.args[0]].value)
            known[number] = xp.asarray(value, dtype=xp.bool if node.type is BOOL else compute, device=device)
        else:
            known[number] = TABLE[node.op].array(xp, *(known[operand] for operand in node.args))
            for operand in set(node.args):
                if last[operand] == number and operand not in wanted:
                    del known[operand]
    return known


def _plain(recipe: Recipe, xp: Namespace, arrays: list[Array], dtype: str, inputs: Sequence[float]) -> list[Array]:
    """One real array through a plain rule and the options around it: new parameter and slots in the compute dtype."""
    compute = getattr(xp, compute_dtype(dtype))
    cast = [xp.astype(a, compute, copy=False) for a in arrays]
    backend = Eager(recipe.name, xp, compute, device_of(arrays[0]))
    buffers = {name: Value(backend, a, argument=name) for name, a in zip(recipe.buffers, cast, strict=True)}
    scalars: dict[str, _Raw] = dict(zip(recipe.inputs, map(np.float64, inputs), strict=True))
    result = recipe.update(Functions(backend), buffers, scalar_arguments(backend, scalars))
    new = [among_arrays(result[name]) for name in recipe.buffers if name != "g"]
    return [_apart(xp, raw, arrays, handed_through=any(raw is a for a in cast)) for raw in new]


def _parts(xp: Namespace, leaf: Leaf) -> Iterator[list[Array]]:
    """The leaf's arrays [p, g, *slots] as real arrays: themselves, or their real and then their imaginary parts."""
    arrays = [leaf.p, leaf.g, *leaf.slots]
    if leaf.dtype not in PART:
        yield arrays
        return
    yield [xp.real(a) if dtype_name(a) in COMPLEX_DTYPES else a for a in arrays]
    yield [xp.imag(a) if dtype_name(a) in COMPLEX_DTYPES else xp.zeros_like(a) for a in arrays]


def _put(xp: Namespace, old: Array, new: Array, mutable: bool) -> Array:
    new = xp.astype(new, old.dtype, copy=False)
    if not mutable:
        return new
    old[...] = new
    return old


def _squares_sum(traced: Traced, leaf: Leaf, inputs: Sequence[float]) -> float:
    """The float64 sum of the squares of the leaf's loaded gradient, by the tree of `trace.sums`."""
    xp = namespace(leaf.g)
    program = traced.programs(leaf.dtype, leaf.g_dtype)["norm"]
    reduced = program.reduces
    assert reduced is not None
    with np.errstate(all="ignore"):
        parts = [_carried_out(program, xp, arrays, inputs, [reduced])[reduced] for arrays in _parts(xp, leaf)]
        flat = xp.reshape(parts[0] if len(parts) == 1 else xp.stack(parts, axis=-1), (-1,))
        xp, wide = leaf.library.in_float64(flat)
        if not wide.shape[0]:
            return 0.0
        return float(fold(xp, chunk_sums(xp, wide * wide)))
