"""The closed table of operations: each row says once what an operation is on every engine.

A column holds a small text template. ``{0}``, ``{1}``, ``{2}`` are the operands and ``{r}`` the result;
``{T}`` is the floating-point type and ``{S}`` the suffix of its functions. All operations here are
correctly rounded by IEEE 754 (or only select, compare and combine), so every engine gives the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np


class Type(Enum):
    """What a value of a rule is: a float of the compute dtype, a truth value, or a 32-bit word."""

    REAL = "real"
    BOOL = "bool"
    UINT32 = "uint32"


REAL, BOOL, UINT32 = Type.REAL, Type.BOOL, Type.UINT32


Operation: TypeAlias = Callable[..., Any]  # (xp, *arrays): any Array API namespace


@dataclass(frozen=True)
class Op:
    """One row of the table: operand types, result type, and the operation in each target's words."""

    name: str
    takes: tuple[Type, ...]
    gives: Type
    array: Operation
    llvm: str
    cuda: str
    symbol: str = ""  # infix or prefix spelling for `source("graph")`


def _infix(function: Callable[[Any, Any], Any]) -> Operation:
    return lambda xp, a, b: function(a, b)


def integer_power(x: float, n: float) -> np.float64:
    """``x**n`` for an integer ``n`` by repeated squaring, low bit first: the order every engine follows.

    Exponents beyond 2**62 count as that.
    """
    exponent = int(abs(n)) if abs(n) < 2.0**62 else 2**62
    result, base = np.float64(1.0), np.float64(x)
    while exponent:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return np.float64(1.0) / result if n < 0 else result


_R, _RR, _BB = (REAL,), (REAL, REAL), (BOOL, BOOL)

_ROWS = (
    Op("add", _RR, REAL, _infix(operator.add), "{r} = fadd {T} {0}, {1}", "{0} + {1}", "+"),
    Op("subtract", _RR, REAL, _infix(operator.sub), "{r} = fsub {T} {0}, {1}", "{0} - {1}", "-"),
    Op("multiply", _RR, REAL, _infix(operator.mul), "{r} = fmul {T} {0}, {1}", "{0} * {1}", "*"),
    Op("divide", _RR, REAL, _infix(operator.truediv), "{r} = fdiv {T} {0}, {1}", "{0} / {1}", "/"),
    Op("negative", _R, REAL, lambda xp, a: -a, "{r} = fneg {T} {0}", "-{0}", "-"),
    Op(
        "sqrt",
        _R,
        REAL,
        lambda xp, a: xp.sqrt(a),
        "{r} = call {T} @llvm.sqrt.{S}({T} {0})",
        "sqrt{S}({0})",
    ),
    Op("abs", _R, REAL, lambda xp, a: xp.abs(a), "{r} = call {T} @llvm.fabs.{S}({T} {0})", "fabs{S}({0})"),
    Op(
        "isfinite",
        _R,
        BOOL,
        lambda xp, a: xp.isfinite(a),
        "{r}.abs = call {T} @llvm.fabs.{S}({T} {0})\n  {r} = fcmp olt {T} {r}.abs, 0x7FF0000000000000",
        "fabs{S}({0}) < XP_INFINITY",
    ),
    Op("less", _RR, BOOL, _infix(operator.lt), "{r} = fcmp olt {T} {0}, {1}", "{0} < {1}", "<"),
    Op("less_equal", _RR, BOOL, _infix(operator.le), "{r} = fcmp ole {T} {0}, {1}", "{0} <= {1}", "<="),
    Op("greater", _RR, BOOL, _infix(operator.gt), "{r} = fcmp ogt {T} {0}, {1}", "{0} > {1}", ">"),
    Op("greater_equal", _RR, BOOL, _infix(operator.ge), "{r} = fcmp oge {T} {0}, {1}", "{0} >= {1}", ">="),
    Op("equal", _RR, BOOL, _infix(operator.eq), "{r} = fcmp oeq {T} {0}, {1}", "{0} == {1}", "=="),
    Op("not_equal", _RR, BOOL, _infix(operator.ne), "{r} = fcmp une {T} {0}, {1}", "{0} != {1}", "!="),
    Op("logical_and", _BB, BOOL, _infix(operator.and_), "{r} = and i1 {0}, {1}", "{0} && {1}", "&"),
    Op("logical_or", _BB, BOOL, _infix(operator.or_), "{r} = or i1 {0}, {1}", "{0} || {1}", "|"),
    Op("logical_xor", _BB, BOOL, _infix(operator.xor), "{r} = xor i1 {0}, {1}", "{0} != {1}", "^"),
    Op("logical_not", (BOOL,), BOOL, lambda xp, a: xp.logical_not(a), "{r} = xor i1 {0}, true", "!{0}", "~"),
    Op(
        "where",
        (BOOL, REAL, REAL),
        REAL,
        lambda xp, c, a, b: xp.where(c, a, b),
        "{r} = select i1 {0}, {T} {1}, {T} {2}",
        "{0} ? {1} : {2}",
    ),
    # Scalars only, and only with an integer exponent: `beta**t`.
    Op(
        "power",
        _RR,
        REAL,
        lambda xp, x, n: integer_power(x, n),
        "{r} = call double @integer_power(double {0}, double {1})",
        "integer_power({0}, {1})",
        "**",
    ),
)

# 32-bit words, for random numbers. LLVM keeps a word in a lane of 64 bits, whose upper half means nothing: a product
# reads the lower halves only, and so is one vector instruction.
_WORD = 0xFFFFFFFF
_PRODUCT = (
    "{r}.a = and i64 {0}, 4294967295\n  {r}.b = and i64 {1}, 4294967295\n  {r}.product = mul nuw i64 {r}.a, {r}.b\n  "
)
_UU = (UINT32, UINT32)

_WORD_ROWS = (
    Op(
        "multiply_high",
        _UU,
        UINT32,
        lambda xp, a, b: (a * b >> 32) & _WORD,
        _PRODUCT + "{r} = lshr i64 {r}.product, 32",
        "__umulhi({0}, {1})",
    ),
    Op(
        "multiply_low",
        _UU,
        UINT32,
        lambda xp, a, b: a * b & _WORD,
        _PRODUCT + "{r} = or i64 {r}.product, 0",
        "{0} * {1}",
    ),
    Op("bitwise_xor", _UU, UINT32, _infix(operator.xor), "{r} = xor i64 {0}, {1}", "{0} ^ {1}", "^"),
    Op(
        "word_greater_equal",
        _UU,
        BOOL,
        _infix(operator.ge),
        "{r}.a = trunc i64 {0} to i32\n  {r}.b = trunc i64 {1} to i32\n  {r} = icmp uge i32 {r}.a, {r}.b",
        "{0} >= {1}",
        ">=",
    ),
)

TABLE: dict[str, Op] = {row.name: row for row in (*_ROWS, *_WORD_ROWS)}
