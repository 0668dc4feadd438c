"""The reference engine: a rule carried out as it stands, operation by operation, on any Array API namespace.

It defines what the fused engines must give. Each array operation makes a new array; nothing is clever here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..fusion.dtypes import COMPLEX_DTYPES, PART, compute_dtype
from ..fusion.language import Functions, Value
from ..fusion.norm import chunk_sums, fold
from ..fusion.ops import BOOL, Op, Type
from ..leaves import Leaf, device_of, dtype_name, namespace
from ..recipe import Recipe


class Eager:
    """The backend that carries out: scalars in float64 on the host, arrays in their namespace."""

    def __init__(self, rule: str, xp: Any, dtype: Any, device: Any) -> None:
        self.rule, self.xp, self.dtype, self.device = rule, xp, dtype, device

    def constant(self, value: float | bool) -> Any:
        return np.bool_(value) if isinstance(value, bool) else np.float64(value)

    def word(self, value: int) -> Any:
        return value

    def scalar_op(self, op: Op, args: list[Any]) -> Any:
        return op.array(np, *args)[()]  # np.where makes an array of a scalar

    def array_op(self, op: Op, args: list[Any]) -> Any:
        return op.array(self.xp, *args)

    def spread(self, scalar: Any, type: Type) -> Any:
        if type is BOOL:
            return self.xp.asarray(bool(scalar), device=self.device)
        return self.xp.asarray(float(scalar), dtype=self.dtype, device=self.device)


def _prepared(recipe: Recipe, xp: Any, arrays: list[Any], dtype: str, scalars: dict[str, float]) -> tuple[Any, ...]:
    """A backend, and the leaf's arrays in the compute dtype and the scalars as values of it."""
    compute = getattr(xp, compute_dtype(dtype))
    cast = [xp.astype(a, compute, copy=False) for a in arrays]
    backend = Eager(recipe.name, xp, compute, device_of(arrays[0]))
    buffers = {name: Value(backend, a, argument=name) for name, a in zip(recipe.buffers, cast, strict=True)}
    inputs = {
        name: Value(backend, np.float64(x), scalar=True, integral=name == "t", argument=name)
        for name, x in scalars.items()
    }
    return backend, buffers, inputs, cast


def computed(recipe: Recipe, leaf: Leaf, scalars: dict[str, float]) -> list[Any]:
    """The leaf's new parameter and slots, in the compute dtype."""
    xp = namespace(leaf.p)
    with np.errstate(all="ignore"):
        parts = [_part(recipe, xp, arrays, leaf.dtype, scalars) for arrays in _parts(xp, leaf)]
        return [_joined(xp, [part[i] for part in parts], leaf) for i in range(1 + len(leaf.slots))]


def write(leaf: Leaf, new: list[Any]) -> None:
    """Write what was computed, or put new arrays in the place of immutable ones."""
    xp = namespace(leaf.p)
    with np.errstate(all="ignore"):
        leaf.p = _put(xp, leaf.p, new[0], leaf.mutable)
        leaf.slots = [_put(xp, old, value, leaf.mutable) for old, value in zip(leaf.slots, new[1:], strict=True)]


def _part(recipe: Recipe, xp: Any, arrays: list[Any], dtype: str, scalars: dict[str, float]) -> list[Any]:
    """One real array through the rule: the new parameter and slots in the compute dtype."""
    backend, buffers, inputs, cast = _prepared(recipe, xp, arrays, dtype, scalars)
    result = recipe.update(Functions(backend), buffers, inputs)
    shape = tuple(arrays[0].shape)
    outputs = []
    for name in recipe.buffers:
        if name != "g":
            value = result[name]
            raw = backend.spread(value.raw, value.type) if value.scalar else value.raw
            if any(raw is a for a in cast):  # an input handed through: it may be written before it is read
                raw = xp.asarray(raw, copy=True)
            outputs.append(xp.broadcast_to(raw, shape))
    return outputs


def _parts(xp: Any, leaf: Leaf) -> Iterator[list[Any]]:
    """The leaf's arrays [p, g, *slots] as real arrays: themselves, or their real and then their imaginary parts."""
    arrays = [leaf.p, leaf.g, *leaf.slots]
    if leaf.dtype not in PART:
        yield arrays
        return
    yield [real(xp, a) for a in arrays]
    yield [imag(xp, a) for a in arrays]


def real(xp: Any, a: Any) -> Any:
    return xp.real(a) if dtype_name(a) in COMPLEX_DTYPES else a


def imag(xp: Any, a: Any) -> Any:
    return xp.imag(a) if dtype_name(a) in COMPLEX_DTYPES else xp.zeros_like(a)


def _joined(xp: Any, parts: list[Any], leaf: Leaf) -> Any:
    """The parts as one array again. Not ``re + 1j*im``, which makes NaN of an infinite part."""
    if leaf.dtype not in PART:
        return parts[0]
    re, im = parts
    if leaf.space == "jax":
        import jax

        return jax.lax.complex(re, im)
    if leaf.space == "torch":
        return xp.complex(re.contiguous(), im.contiguous())
    host = np if leaf.space not in ("numpy", "cupy") else xp
    out = host.empty(tuple(re.shape), dtype=leaf.dtype)
    out.real, out.imag = (re, im) if host is xp else (np.asarray(re), np.asarray(im))
    return out if host is xp else xp.asarray(out, device=device_of(leaf.p))


def _put(xp: Any, old: Any, new: Any, mutable: bool) -> Any:
    new = xp.astype(new, old.dtype, copy=False)
    if not mutable:
        return new
    old[...] = new
    return old


def squares_sum(recipe: Recipe, leaf: Leaf, scalars: dict[str, float]) -> float:
    """The float64 sum of the squares of the leaf's loaded gradient, by the tree of `fusion.norm`."""
    xp = namespace(leaf.g)
    with np.errstate(all="ignore"):
        parts = []
        for arrays in _parts(xp, leaf):
            backend, buffers, inputs, _ = _prepared(recipe, xp, arrays, leaf.dtype, scalars)
            parts.append(recipe.gradient(Functions(backend), buffers, inputs).raw)
        flat = xp.reshape(parts[0] if len(parts) == 1 else xp.stack(parts, axis=-1), (-1,))
        if leaf.space == "jax":  # its float64 may be switched off
            xp, flat = np, np.asarray(flat)
        wide = xp.astype(flat, xp.float64)
        if not wide.shape[0]:
            return 0.0
        return float(fold(xp, chunk_sums(xp, wide * wide)))
