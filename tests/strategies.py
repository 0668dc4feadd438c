"""Strategies of hypothesis for hyperparameters, made from what classes declare."""

import math
from typing import Any

from hypothesis import strategies as st

import xpoptim as xo


def values(kind: type[xo.Optimizer], name: str) -> st.SearchStrategy[Any]:
    """Whatever may be assigned, but for schedules."""
    declared = kind._declared[name]
    if declared.choices:
        return st.sampled_from(declared.choices)
    low, high = (limit if math.isfinite(limit) else None for limit in (declared.low, declared.high))
    numbers = st.floats(low, high, allow_nan=False, allow_infinity=None in (low, high))
    return st.none() | numbers if declared.optional else numbers


def hyperparameters(kind: type[xo.Optimizer]) -> st.SearchStrategy[dict[str, Any]]:
    """Those of the rule itself, all of them at random."""
    return st.fixed_dictionaries({name: values(kind, name) for name in kind._hyperparameters})
