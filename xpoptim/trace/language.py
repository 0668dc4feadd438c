"""What a rule sees: `Value`, a number or array it may compute with, and `Functions`, its ``xp``.

Both know the closed table and nothing else. A *backend* decides what an operation does: the tracer
records it, the reference engine carries it out at once. So the semantics (which operations exist, their
types, when a scalar is rounded, what ``maximum`` means for NaN) stand here once, for every engine.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import numpy as np

from ..errors import TraceError
from .ops import BOOL, REAL, TABLE, UINT32, Op, Type

Operand: TypeAlias = "Value | float | np.number | np.bool_"  # what a rule may write beside a value
_Raw = TypeVar("_Raw")


class Backend(Protocol[_Raw]):
    """Carries out operations. Scalars are float64 (or bool); arrays are of the compute dtype (or bool)."""

    rule: str  # the name of the rule, for errors

    def constant(self, value: float | bool) -> _Raw: ...
    def word(self, value: int) -> _Raw: ...
    def operation(self, op: Op, args: list[_Raw], *, scalar: bool) -> _Raw: ...
    def spread(self, scalar: _Raw, type: Type) -> _Raw:
        """A scalar, rounded once to the compute dtype, as an operand of array operations."""


def _prefix(name: str) -> Callable[[Value], Value]:
    """``<operator> value``, a row of the table."""
    return lambda self: apply(self.backend, name, self)


def _operator(name: str) -> Callable[[Value, Operand], Value]:
    """``value <operator> other``, a row of the table."""
    return lambda self, other: apply(self.backend, name, self, other)


def _reflected(name: str) -> Callable[[Value, Operand], Value]:
    """``other <operator> value``, where the other is a number."""
    return lambda self, other: apply(self.backend, name, other, self)


def _in_place(sign: str) -> Callable[[Value, Operand], Value]:
    """``m += x`` would change the caller's array in plain NumPy, so it is refused for arguments."""

    def operator(self: Value, other: Operand) -> Value:
        if self.argument and not self.scalar:
            self._refuse(
                f"writes to its argument {self.argument!r}: write {self.argument} = {self.argument} {sign} ..."
            )
        return NotImplemented

    return operator


class Value:
    """A scalar or an array inside a rule. Immutable: every operation gives a new one."""

    __slots__ = ("argument", "backend", "integral", "origin", "raw", "scalar", "type")

    def __init__(
        self,
        backend: Backend,
        raw: Any,  # the backend's own
        type: Type = REAL,
        *,
        scalar: bool = False,
        integral: bool = False,
        argument: str | None = None,
        origin: frozenset[str] = frozenset(),
    ) -> None:
        self.backend, self.raw, self.type = backend, raw, type
        self.scalar, self.integral, self.argument = scalar, integral, argument
        self.origin = frozenset({argument}) if argument else origin  # the arguments it was computed from

    # Arithmetic, comparison, logic: one row of the table each.
    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("subtract"), _reflected("subtract")
    __mul__, __rmul__ = _operator("multiply"), _reflected("multiply")
    __truediv__, __rtruediv__ = _operator("divide"), _reflected("divide")
    __lt__, __le__, __gt__ = _operator("less"), _operator("less_equal"), _operator("greater")
    __eq__, __ne__ = _operator("equal"), _operator("not_equal")  # type: ignore[assignment]
    __and__, __rand__ = _operator("logical_and"), _reflected("logical_and")
    __or__, __ror__ = _operator("logical_or"), _reflected("logical_or")
    __rxor__ = _reflected("logical_xor")

    def __ge__(self, other: object) -> Value:
        return apply(self.backend, "word_greater_equal" if self.type is UINT32 else "greater_equal", self, other)

    def __xor__(self, other: Operand) -> Value:
        return apply(self.backend, "bitwise_xor" if self.type is UINT32 else "logical_xor", self, other)

    __neg__, __abs__, __invert__ = _prefix("negative"), _prefix("abs"), _prefix("logical_not")

    def __pos__(self) -> Value:
        return self

    def __pow__(self, exponent: Operand) -> Value:
        return power(self, exponent)

    def __rpow__(self, base: Operand) -> Value:
        return power(lift(self.backend, base), self)

    __hash__ = object.__hash__

    __iadd__, __isub__, __imul__, __itruediv__ = _in_place("+"), _in_place("-"), _in_place("*"), _in_place("/")
    __ipow__, __iand__, __ior__, __ixor__ = _in_place("**"), _in_place("&"), _in_place("|"), _in_place("^")

    def __setitem__(self, index: object, value: object) -> None:
        self._refuse(
            f"writes to {self._who()}: a rule returns new values instead, for example xp.where(mask, new, old)"
        )

    # Everything that would need the numbers now.
    def _who(self) -> str:
        if self.argument:
            return f"its argument {self.argument!r}"
        names = ", ".join(repr(name) for name in sorted(self.origin))
        return f"a value computed from {names}" if names else "a constant"

    def _refuse(self, what: str) -> NoReturn:
        raise TraceError(f"{self.backend.rule} {what}")

    def __bool__(self) -> bool:
        self._refuse(
            f"branches on {self._who()}: use xp.where, or annotate a hyperparameter `bool` or `Literal` to make it "
            "static (`and`, `or`, `not`, chained comparisons, min() and max() branch too)"
        )

    def __float__(self) -> float:
        self._refuse(f"turns {self._who()} into a Python number (functions of `math` do): use the functions of xp")

    __int__ = __index__ = __complex__ = __float__

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse(f"indexes {self._who()}: a fused rule is elementwise")

    def __len__(self) -> int:
        self._refuse(f"asks for the length of {self._who()}: a fused rule is elementwise")

    def __iter__(self) -> NoReturn:
        self._refuse(f"iterates over {self._who()}: a fused rule is elementwise")

    def __matmul__(self, other: object) -> NoReturn:
        self._refuse(f"multiplies matrices with {self._who()}: a fused rule is elementwise")

    __rmatmul__ = __matmul__

    def __floordiv__(self, other: object) -> NoReturn:
        self._refuse(f"uses //, % or divmod on {self._who()}, which are not in the table of operations")

    __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __floordiv__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols ask for these to find out what an object is
            raise AttributeError(name)
        self._refuse(f"uses .{name} of {self._who()}: use the functions of xp")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Operand, **kwargs: object) -> Value:
        # `np.float64(2) * g` arrives here; `np.sqrt(g)` does too, and is refused by name.
        name = {"power": "power", "true_divide": "divide"}.get(ufunc.__name__, ufunc.__name__)
        plain = all(isinstance(x, Value | numbers.Number | np.generic) for x in inputs)
        infix = name in TABLE and TABLE[name].symbol and len(inputs) == 2
        if method == "__call__" and not kwargs and plain and infix and not isinstance(inputs[0], Value):
            if name == "power":
                return power(lift(self.backend, inputs[0]), inputs[1])
            return apply(self.backend, name, *inputs)
        self._refuse(f"calls np.{ufunc.__name__} on {self._who()}: call xp.{ufunc.__name__} if the table has it")

    def __array_function__(self, function: Callable[..., object], *rest: object) -> NoReturn:
        self._refuse(f"calls np.{function.__name__} on {self._who()}: use the functions of xp")

    def __repr__(self) -> str:
        return f"<{'scalar' if self.scalar else 'array'} {self._who()} in {self.backend.rule}>"


def scalar_arguments(backend: Backend[_Raw], raw: Mapping[str, _Raw]) -> dict[str, Value]:
    """The scalars that a rule is given, of which ``t`` is an integer."""
    return {name: Value(backend, x, scalar=True, integral=name == "t", argument=name) for name, x in raw.items()}


def lift(backend: Backend, x: object, type: Type = REAL) -> Value:
    """A Python or NumPy number written into a rule, as a scalar value, or as a word where one is asked for."""
    if isinstance(x, Value):
        return x
    if type is UINT32 and isinstance(x, int):
        return Value(backend, backend.word(x), UINT32)
    if isinstance(x, bool | np.bool_):
        return Value(backend, backend.constant(bool(x)), BOOL, scalar=True)
    if isinstance(x, numbers.Real | np.floating | np.integer):
        integral = isinstance(x, numbers.Integral | np.integer)
        return Value(backend, backend.constant(float(x)), scalar=True, integral=integral)
    raise TraceError(
        f"{backend.rule} computes with {x.__class__.__name__} {x!r}: "
        "a rule may use its arguments, numbers, and the functions of xp"
    )


def among_arrays(value: Value) -> Any:
    """What a backend has for a value beside arrays: a scalar is rounded and fills them."""
    return value.backend.spread(value.raw, value.type) if value.scalar else value.raw


def apply(backend: Backend, name: str, *operands: object) -> Value:
    """One operation of the table. Scalars stay scalar among themselves, and are rounded beside an array."""
    op = TABLE[name]
    values = [lift(backend, x, type) for x, type in zip(operands, op.takes, strict=True)]
    for position, (value, type) in enumerate(zip(values, op.takes, strict=True)):
        if value.type is not type:
            raise TraceError(
                f"{backend.rule}: operand {position + 1} of {name} is {value._who()} of type {value.type.value}, "
                f"but {name} takes {type.value} (xp.where turns a comparison into numbers)"
            )
    origin = frozenset().union(*(value.origin for value in values))
    scalar = all(value.scalar for value in values)
    integral = name in {"add", "subtract", "multiply", "negative"} and all(value.integral for value in values)
    raw = backend.operation(op, [value.raw if scalar else among_arrays(value) for value in values], scalar=scalar)
    return Value(backend, raw, op.gives, scalar=scalar, integral=integral, origin=origin)


def power(base: Value, exponent: Operand) -> Value:
    """``base**exponent``: repeated squaring for integers written out, or a scalar to an integer step count."""
    if isinstance(exponent, numbers.Real | np.floating | np.integer) and float(exponent).is_integer():
        return _constant_power(base, int(float(exponent)))
    if isinstance(exponent, Value) and exponent.integral and base.scalar:
        return apply(base.backend, "power", base, exponent)
    shown = exponent._who() if isinstance(exponent, Value) else repr(exponent)
    base._refuse(
        f"raises {base._who()} to the power {shown}: the exponent may be an integer constant or, "
        "for a scalar, an integer expression of t (a square root is xp.sqrt)"
    )


def _constant_power(base: Value, n: int) -> Value:
    exponent, square = abs(n), base
    result: Value | None = None
    while exponent:
        if exponent & 1:
            result = square if result is None else result * square
        exponent >>= 1
        if exponent:
            square = square * square
    if result is None:
        return lift(base.backend, 1)
    return 1.0 / result if n < 0 else result


def _unary(name: str) -> Callable[[Functions, Operand], Value]:
    """``xp.<name>(x)``, a row of the table."""

    def function(self: Functions, x: Operand) -> Value:
        return self._call(name, x)

    function.__qualname__ = f"Functions.{name}"  # which errors show
    return function


def _binary(name: str) -> Callable[[Functions, Operand, Operand], Value]:
    """``xp.<name>(x1, x2)``, a row of the table."""

    def function(self: Functions, x1: Operand, x2: Operand) -> Value:
        return self._call(name, x1, x2)

    function.__qualname__ = f"Functions.{name}"
    return function


class Functions:
    """The ``xp`` of a rule: the closed table under its Array API names, and what is composed of it."""

    inf, nan, pi, e = math.inf, math.nan, math.pi, math.e

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def _call(self, name: str, *operands: Operand) -> Value:
        return apply(self._backend, name, *operands)

    add, subtract = _binary("add"), _binary("subtract")
    multiply, divide = _binary("multiply"), _binary("divide")
    less, less_equal = _binary("less"), _binary("less_equal")
    greater, greater_equal = _binary("greater"), _binary("greater_equal")
    equal, not_equal = _binary("equal"), _binary("not_equal")
    logical_and, logical_or = _binary("logical_and"), _binary("logical_or")
    logical_xor, logical_not = _binary("logical_xor"), _unary("logical_not")
    negative, abs, sqrt, isfinite = _unary("negative"), _unary("abs"), _unary("sqrt"), _unary("isfinite")

    def positive(self, x: Operand) -> Value:
        return lift(self._backend, x)

    def pow(self, x1: Operand, x2: Operand) -> Value:
        return power(lift(self._backend, x1), x2)

    def square(self, x: Operand) -> Value:
        return self._call("multiply", x, x)

    def multiply_words(self, x1: Operand, x2: Operand) -> tuple[Value, Value]:
        """The high and the low 32 bits of the product of two words."""
        return self._call("multiply_high", x1, x2), self._call("multiply_low", x1, x2)

    def where(self, condition: Operand, x1: Operand, x2: Operand) -> Value:
        return self._call("where", condition, x1, x2)

    def maximum(self, x1: Operand, x2: Operand) -> Value:
        """``where((x1 > x2) | (x1 != x1), x1, x2)``: a NaN on either side stays."""
        x1 = lift(self._backend, x1)
        return self.where((x1 > x2) | (x1 != x1), x1, x2)

    def minimum(self, x1: Operand, x2: Operand) -> Value:
        """``where((x1 < x2) | (x1 != x1), x1, x2)``: a NaN on either side stays."""
        x1 = lift(self._backend, x1)
        return self.where((x1 < x2) | (x1 != x1), x1, x2)

    def clip(self, x: Operand, min: Operand | None = None, max: Operand | None = None) -> Value:
        x = x if min is None else self.maximum(x, min)
        return lift(self._backend, x) if max is None else self.minimum(x, max)

    def sign(self, x: Operand) -> Value:
        """-1, 0 or 1; ``sign(±0) = +0`` and ``sign(NaN) = NaN``."""
        x = lift(self._backend, x)
        return self.where(x > 0, 1.0, self.where(x < 0, -1.0, self.where(x == 0, 0.0, x)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(n for n in vars(Functions) if not n.startswith("_") and n != "multiply_words"))
        raise TraceError(
            f"{self._backend.rule} uses xp.{name}, which is not in the table of operations: {known}. "
            "A class with fused = False has a rule of any Array API code"
        )
