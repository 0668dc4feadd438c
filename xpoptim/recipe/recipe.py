"""A recipe: everything that is computed for one tensor in one step, the options around the rule.

It is traced, and the engines get what was traced: `Traced`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from ..arrays.dtypes import compute_dtype, slot_dtype
from ..arrays.namespaces.lookup import library_with
from ..arrays.types import Array, Namespace
from ..errors import TraceError
from ..trace.language import Functions, Value, lift
from ..trace.program import Buffer, Program
from ..trace.tracer import Traced as _Pass
from ..trace.tracer import trace

Rule: TypeAlias = Callable[..., object]  # what it returns is checked


@dataclass(frozen=True)
class Option:
    """``function`` takes buffers by position and scalars by keyword, and gives the new value of its first buffer."""

    function: Callable[..., Value]
    active: Callable[[Any], bool]  # asked of the optimizer
    reduction: str | None = None  # a scalar that it needs of all gradients as they are before it

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        kinds = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        kinds = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in kinds if p.kind is p.KEYWORD_ONLY and p.name != self.reduction)

    def apply(self, xp: Functions, values: dict[str, Value], scalars: Mapping[str, Value]) -> None:
        names = (*self.scalars, *((self.reduction,) if self.reduction else ()))
        arrays = [values[name] for name in self.buffers]
        values[self.buffers[0]] = self.function(xp, *arrays, **{name: scalars[name] for name in names})


@dataclass(frozen=True)
class Recipe:
    """What a step computes: the options that are on, around the rule. Hashable, and free of numbers and arrays."""

    name: str  # "Adam.rule", for errors
    rule: Rule
    slots: tuple[str, ...]
    takes: tuple[str, ...]  # the rule's scalars, "t" and static fields included
    statics: tuple[tuple[str, object], ...]
    before: tuple[Option, ...]
    after: tuple[Option, ...]
    fused: bool = True  # False: the rule is plain Array API code that no kernel can hold

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        return ("p", "g", *self.slots)

    @cached_property
    def hyperparameters(self) -> tuple[str, ...]:
        """The scalars that must be known at each step, apart from t and the reductions."""
        static = dict(self.statics)
        names = [name for name in self.takes if name != "t" and name not in static]
        for option in (*self.before, *self.after):
            names += [name for name in option.scalars if name not in names]
        return tuple(names)

    @cached_property
    def reductions(self) -> tuple[str, ...]:
        return tuple(option.reduction for option in self.before if option.reduction)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the scalar program, in order."""
        return ("t", *self.hyperparameters, *self.reductions)

    def gradient(self, xp: Functions, buffers: dict[str, Value], scalars: Mapping[str, Value]) -> Value:
        """The gradient as the first option that reduces it finds it: what the global norm is taken of."""
        values = dict(buffers)
        for option in self.before:
            if option.reduction:
                break
            option.apply(xp, values, scalars)
        return values["g"]

    def update(self, xp: Functions, buffers: dict[str, Value], scalars: Mapping[str, Value]) -> dict[str, Value]:
        """The whole step for one tensor: new values of the parameter and the slots."""
        values = dict(buffers)
        for option in self.before:
            option.apply(xp, values, scalars)
        values.update(self._ruled(xp, values, scalars))
        for option in self.after:
            option.apply(xp, values, scalars)
        return {name: values[name] for name in self.buffers if name != "g"}

    def _ruled(self, xp: Functions, values: dict[str, Value], scalars: Mapping[str, Value]) -> dict[str, Value]:
        arrays = [_as_argument(values[name], name) for name in self.buffers]
        static = dict(self.statics)
        keywords = {name: static.get(name, scalars.get(name)) for name in self.takes}
        try:
            result = self.rule(xp, *arrays, **keywords) if self.fused else _plain(self.rule, xp, arrays, keywords)
        except TraceError:
            raise
        except Exception as error:
            if _of_signal_handler(error):
                raise
            if isinstance(error, ValueError) and "read-only" in str(error):
                raise TraceError(f"{self.name} writes to an argument: a rule returns new arrays instead") from error
            what = "could not be traced" if self.fused else "raised an error"
            raise TraceError(f"{self.name} {what}: {type(error).__name__}: {error}") from error
        return self._checked(result, arrays[0])

    def _checked(self, result: object, p: Value) -> dict[str, Value]:
        outputs = tuple(name for name in self.buffers if name != "g")
        results = result if isinstance(result, tuple | list) else (result,)
        wanted = ", ".join(f"new {name}" for name in outputs)
        if len(results) != len(outputs):
            raise TraceError(
                f"{self.name} returns {len(results)} value{'s' * (len(results) != 1)} "
                f"but must return {len(outputs)}: {wanted}"
            )
        values = {}
        for name, value in zip(outputs, results, strict=True):
            if value is None:
                raise TraceError(f"{self.name} returns None for new {name}: it must return {wanted}")
            values[name] = lift(p.backend, value)
            if values[name].type.value != "real":
                raise TraceError(f"{self.name} returns a comparison for new {name}: xp.where turns it into numbers")
        return values


def _as_argument(value: Value, name: str) -> Value:
    """The rule's own argument again, after an option has changed it: it may not be written to either."""
    return Value(value.backend, value.raw, value.type, scalar=value.scalar, argument=name)


def _of_signal_handler(error: Exception) -> bool:
    """Whether a Python signal handler raised it: that says nothing of the rule that happened to run."""
    import signal  # only errors need them
    import traceback

    handlers = filter(callable, map(signal.getsignal, signal.valid_signals()))
    codes = {
        getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None) for handler in handlers
    }
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


class Traced:
    """A recipe, traced. What its rule takes from outside, a helper or a global, is fixed by that, on every engine.

    Tracing does not ask for dtypes: it is done once, and gives the programs of all.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        functions: dict[str, _Pass] = {"norm": recipe.gradient} if recipe.reductions else {}
        if recipe.fused:
            functions["update"] = recipe.update
        buffers = _buffers(recipe, "float32", "float32")
        self._passes = {
            kind: trace(function, recipe.name, buffers, recipe.inputs) for kind, function in functions.items()
        }
        self._programs: dict[tuple[str, str], dict[str, Program]] = {}

    def programs(self, dtype: str, g_dtype: str) -> dict[str, Program]:
        """The passes of a step for one pair of dtypes: "update", and "norm" before it if an option needs that.

        A plain rule has no "update".
        """
        if (dtype, g_dtype) not in self._programs:
            buffers, compute = _buffers(self.recipe, dtype, g_dtype), compute_dtype(dtype)
            self._programs[dtype, g_dtype] = {
                kind: replace(program, buffers=buffers, compute=compute) for kind, program in self._passes.items()
            }
        return self._programs[dtype, g_dtype]


def _buffers(recipe: Recipe, dtype: str, g_dtype: str) -> tuple[Buffer, ...]:
    slots = [Buffer(name, "slot", slot_dtype(dtype)) for name in recipe.slots]
    return (Buffer("p", "param", dtype), Buffer("g", "grad", g_dtype), *slots)


def _plain(rule: Rule, xp: Functions, arrays: list[Value], keywords: Mapping[str, object]) -> tuple[Value, ...]:
    """A rule that is not elementwise, called with the namespace, arrays and floats themselves."""
    backend: Any = xp._backend
    numbers = {name: float(x.raw) if isinstance(x, Value) else x for name, x in keywords.items()}
    given = [library_with(array.raw).read_only(array.raw) for array in arrays]
    result = rule(backend.xp, *given, **numbers)
    own = {id(shown): array.raw for shown, array in zip(given, arrays, strict=True)}  # for what is handed through
    results = result if isinstance(result, tuple | list) else (result,)
    for raw in results:
        _check_plain(backend.rule, raw, arrays[0].raw)
    return tuple(Value(backend, own[id(raw)] if id(raw) in own else _apart(backend.xp, raw, arrays)) for raw in results)


def _apart(xp: Namespace, raw: Array, arrays: list[Value]) -> Array:
    """A result in memory of its own: a view of an argument would change when that is written to."""
    if library_with(raw).shared(raw, [array.raw for array in arrays]):
        return xp.asarray(raw, copy=True)
    return raw


def _check_plain(rule: str, raw: Any, p: Array) -> None:
    """What a plain rule returns is written to arrays of the parameter's shape: nothing is broadcast or cut."""
    shape = getattr(raw, "shape", None)
    if shape is None or tuple(shape) != tuple(p.shape):
        what = f"shape {tuple(shape)}" if shape is not None else type(raw).__name__
        raise TraceError(f"{rule} returns an array of {what} for a parameter of shape {tuple(p.shape)}")
    if "bool" in str(raw.dtype):
        raise TraceError(f"{rule} returns a comparison: xp.where turns it into numbers")
    if "complex" in str(raw.dtype):
        raise TraceError(
            f"{rule} returns complex numbers: a rule gets real and imaginary parts in turn, as real arrays"
        )
