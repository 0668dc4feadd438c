"""Hyperparameters as classes declare them: what may be assigned, and what a schedule may give.

A range is declared where the field is, by the metadata of the ``annotated-types`` package: ``Annotated[Hyper, Ge(0)]``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args, get_origin

import numpy as np

from .annotations import parts

Schedule: TypeAlias = Callable[[int], float]
Hyper: TypeAlias = float | Schedule

_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Bounds:
    """``annotated_types.Interval``, in whose protocol it stands, without an import that takes half as long as ours."""

    __is_annotated_types_grouped_metadata__ = True

    def __init__(self, **limits: float) -> None:
        self.__dict__.update(limits)

    def __iter__(self) -> Iterator[object]:
        from annotated_types import Interval

        return iter(Interval(**vars(self)))


NonNegative: TypeAlias = Annotated[Hyper, Bounds(ge=0)]
Fraction: TypeAlias = Annotated[Hyper, Bounds(ge=0, lt=1)]
Positive: TypeAlias = Annotated[Hyper, Bounds(gt=0)]
PositiveOrInfinite: TypeAlias = Annotated[Hyper, Bounds(gt=0, le=math.inf)]


class Hyperparameter(NamedTuple):
    """What may be assigned: one of the ``choices`` of a static field, else a schedule or a float within ``bounds``."""

    choices: tuple[object, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()  # ("ge", 0)
    low: float = -sys.float_info.max  # what they come to, both ends included: without bounds, all that is finite
    high: float = sys.float_info.max
    optional: bool = False  # None switches it off
    keyword_only: bool = False

    @classmethod
    def declared(cls, kind: object, before: Hyperparameter, *, option: bool, keyword_only: bool) -> Hyperparameter:
        """By its annotation. A range, and that None is allowed, also hold as inherited, from ``before``."""
        kinds, metadata = parts(kind)
        static = all(kind in (bool, NoneType) or get_origin(kind) is Literal for kind in kinds)
        choices = tuple(choice for kind in kinds for choice in _choices(kind)) if static else ()
        optional = (option and NoneType in kinds) or before.optional
        bounds = tuple(_bounds(metadata)) or before.bounds
        lows = [math.nextafter(limit, math.inf) if kind == "gt" else limit for kind, limit in bounds if kind[0] == "g"]
        highs = [
            math.nextafter(limit, -math.inf) if kind == "lt" else limit for kind, limit in bounds if kind[0] == "l"
        ]
        low, high = max(lows, default=cls().low), min(highs, default=cls().high)
        if low > high:
            raise TypeError(f"no number is {_allowed(bounds)}")
        return cls(choices, bounds, low, high, optional, keyword_only)

    def checked(self, owner: str, name: str, value: object) -> object:
        """``value`` as a float (so that a NumPy scalar never promotes the arithmetic), a choice, or a schedule.

        Raises ``TypeError`` for what is of a wrong type and ``ValueError`` for one out of range; both name the
        hyperparameter.
        """
        if self.choices:
            return self._chosen(owner, name, value)
        if callable(value) or (value is None and self.optional):
            return value
        return self._number(owner, name, value)

    def at(self, owner: str, name: str, value: Any, step: int) -> Any:
        """The value in force at ``step`` (0 at the first update)."""
        if not callable(value):
            return value
        try:
            given = value(step)
        except Exception as error:
            error.add_note(f"{owner}: raised by the schedule of {name}, a function step -> float, at step {step}")
            raise
        if type(given) is float and self.low <= given <= self.high:
            return given
        return self._number(owner, f"{name} (its schedule at step {step})", given)

    def _chosen(self, owner: str, name: str, value: object) -> object:
        value = value.item() if isinstance(value, np.generic) else value
        for choice in self.choices:
            if type(choice) is type(value) and choice == value:  # True is no 1
                return choice
        *others, last = map(repr, self.choices)
        error = ValueError if type(value) in map(type, self.choices) else TypeError
        raise error(f"{owner}: {name} is {value!r}: it takes {', '.join(others)}{' or ' if others else ''}{last}")

    def _number(self, owner: str, name: str, value: object) -> float:
        number = _as_float(owner, name, value)
        if self.low <= number <= self.high:
            return number
        allowed = _allowed((kind, limit) for kind, limit in self.bounds if math.isfinite(limit))
        hint = " (None switches it off)" if self.optional else ""
        must = f"{allowed}{hint}" if math.isfinite(number) else "finite"
        raise ValueError(f"{owner}: {name} is {number}: it must be {must}")


def _allowed(bounds: Iterable[tuple[str, float]]) -> str:
    return " and ".join(f"{_WORDS[kind]} {limit}" for kind, limit in bounds)


def _choices(kind: object) -> tuple[object, ...]:
    return (True, False) if kind is bool else get_args(kind) or (None,)


def _bounds(metadata: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for given in metadata:
        own = [(kind, getattr(given, kind)) for kind in _WORDS if getattr(given, kind, None) is not None]
        if not own and getattr(given, "__is_annotated_types_grouped_metadata__", False):
            own = list(_bounds(given))
        if not own and (hasattr(given, "func") or hasattr(given, "multiple_of")):
            raise TypeError(f"{given!r} is no range: it is declared by Ge, Gt, Le, Lt or Interval of annotated-types")
        if not all(isinstance(limit, Real) and limit == limit for _, limit in own):
            raise TypeError(f"{given!r} is no range: its limits are numbers")
        yield from own


def _as_float(owner: str, name: str, value: Any) -> float:
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    text = isinstance(value, bool | np.bool_ | str | bytes | complex)
    number = not text and kind not in "cbOSUmM" and getattr(value, "ndim", 0) == 0 and hasattr(type(value), "__float__")
    try:
        if number:
            return float(value)
    except OverflowError:
        raise ValueError(f"{owner}: {name} is an integer beyond the floats") from None
    except (TypeError, ValueError):
        pass  # it has a conversion, which refuses
    raise TypeError(f"{owner}: {name} is {value!r}: it takes a number, or a schedule (a function step -> float)")
