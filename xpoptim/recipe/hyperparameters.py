"""Hyperparameters as classes declare them: what may be assigned, and what a schedule may give.

A range is declared where the field is, by the metadata of the ``annotated-types`` package: ``Annotated[Hyper, Ge(0)]``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args, get_origin

import numpy as np

from .annotations import parts

Schedule: TypeAlias = Callable[[int], float]
Hyper: TypeAlias = float | Schedule

_COMPARE = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


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
    """What may be assigned: one of the ``choices`` of a static field, else a float within ``bounds`` or a schedule."""

    choices: tuple[object, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()  # ("ge", 0)
    optional: bool = False  # None switches it off
    keyword_only: bool = False

    @classmethod
    def declared(cls, kind: object, before: Hyperparameter, *, option: bool, keyword_only: bool) -> Hyperparameter:
        """By its annotation. A range, and that None is allowed, also hold as inherited, from ``before``."""
        kinds, metadata = parts(kind)
        static = all(kind in (bool, NoneType) or get_origin(kind) is Literal for kind in kinds)
        choices = tuple(choice for kind in kinds for choice in _choices(kind)) if static else ()
        optional = (option and NoneType in kinds) or before.optional
        return cls(choices, tuple(_bounds(metadata)) or before.bounds, optional, keyword_only)

    def checked(self, owner: str, name: str, value: object) -> object:
        """``value`` as a float (so that a NumPy scalar never promotes the arithmetic), a choice, or a schedule.

        Raises ``TypeError`` for what is of a wrong type and ``ValueError`` for one out of range; both name the
        hyperparameter.
        """
        if self.choices:
            return self._chosen(owner, name, value)
        if value is None and self.optional:
            return None
        if callable(value):
            return value
        return self._in_range(owner, name, _as_float(owner, name, value))

    def at(self, owner: str, name: str, value: Any, step: int) -> Any:
        """The value in force at ``step`` (0 at the first update)."""
        if not callable(value):
            return value
        try:
            given = value(step)
        except Exception as error:
            error.add_note(f"{owner}: raised by the schedule of {name}, a function step -> float, at step {step}")
            raise
        place = f" (its schedule at step {step})"
        return self._in_range(owner, name, _as_float(owner, name + place, given), place)

    def _chosen(self, owner: str, name: str, value: object) -> object:
        value = value.item() if isinstance(value, np.generic) else value
        for choice in self.choices:
            if type(choice) is type(value) and choice == value:  # a bool is no 1
                return choice
        *others, last = map(repr, self.choices)
        error = ValueError if type(value) in map(type, self.choices) else TypeError
        raise error(f"{owner}: {name} is {value!r}: it takes {', '.join(others)}{' or ' if others else ''}{last}")

    def _in_range(self, owner: str, name: str, value: float, place: str = "") -> float:
        if not (math.isfinite(value) or any(kind in ("ge", "le") and value == limit for kind, limit in self.bounds)):
            raise ValueError(f"{owner}: {name}{place} is {value}: it must be finite")
        if not all(_COMPARE[kind][0](value, limit) for kind, limit in self.bounds):
            allowed = " and ".join(f"{_COMPARE[k][1]} {limit}" for k, limit in self.bounds if math.isfinite(limit))
            hint = " (None switches it off)" if self.optional else ""
            raise ValueError(f"{owner}: {name}{place} is {value}: it must be {allowed}{hint}")
        return value


def _choices(kind: object) -> tuple[object, ...]:
    return (True, False) if kind is bool else get_args(kind) or (None,)


def _bounds(metadata: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for given in metadata:
        own = [(kind, getattr(given, kind)) for kind in _COMPARE if getattr(given, kind, None) is not None]
        if not own and getattr(given, "__is_annotated_types_grouped_metadata__", False):
            own = list(_bounds(given))
        if not own and (hasattr(given, "func") or hasattr(given, "multiple_of")):
            raise TypeError(f"{given!r} is no range: it is declared by Ge, Gt, Le, Lt or Interval of annotated-types")
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
