"""Checks of hyperparameters: what may be assigned, and what a schedule may give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

NON_NEGATIVE = ("lr", "eps", "weight_decay")
BELOW_ONE = ("momentum", "decay_rate")
POSITIVE = ("clip_norm", "clip_value")
MAY_BE_INFINITE = ("clip_norm",)  # which then only checks that the norm is finite


def checked(owner: str, name: str, value: object, *, static: bool = False, optional: bool = False) -> object:
    """``value`` as a float (so that a NumPy scalar never promotes the arithmetic), a bool if ``static``, or a schedule.

    Raises ``TypeError`` for what is no number and ``ValueError`` for one out of range; both name the hyperparameter.
    """
    if static:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{owner}: {name} is {value!r}: it takes True or False")
        return bool(value)
    if value is None and optional:
        return None
    if callable(value):
        return value
    return in_range(owner, name, as_float(owner, name, value))


def as_float(owner: str, name: str, value: Any) -> float:
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


def in_range(owner: str, name: str, value: float, place: str = "") -> float:
    if not math.isfinite(value) and not (value == math.inf and name in MAY_BE_INFINITE):
        raise ValueError(f"{owner}: {name}{place} is {value}: it must be finite")
    if name in NON_NEGATIVE and value < 0:
        raise ValueError(f"{owner}: {name}{place} is {value}: it must be at least 0")
    if name in POSITIVE and value <= 0:
        raise ValueError(f"{owner}: {name}{place} is {value}: it must be above 0 (None switches it off)")
    if (name in BELOW_ONE or name.rstrip("0123456789") == "beta") and not 0 <= value < 1:
        raise ValueError(f"{owner}: {name}{place} is {value}: it must be at least 0 and below 1")
    return value


def at(owner: str, name: str, value: float | Callable[[int], object], step: int) -> float:
    """The value in force at ``step`` (0 at the first update)."""
    if not callable(value):
        return value
    try:
        given = value(step)
    except Exception as error:
        error.add_note(f"{owner}: raised by the schedule of {name}, a function step -> float, at step {step}")
        raise
    place = f" (its schedule at step {step})"
    return in_range(owner, name, as_float(owner, name + place, given), place)
