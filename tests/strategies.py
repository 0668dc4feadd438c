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
    finite = {bound: limit for bound, limit in declared.bounds if math.isfinite(limit)}
    numbers = st.floats(
        min_value=finite.get("gt", finite.get("ge")),
        max_value=finite.get("lt", finite.get("le")),
        exclude_min="gt" in finite,
        exclude_max="lt" in finite,
        allow_nan=False,
        allow_infinity=("le", math.inf) in declared.bounds,
    )
    return st.none() | numbers if declared.optional else numbers


def hyperparameters(kind: type[xo.Optimizer]) -> st.SearchStrategy[dict[str, Any]]:
    """Those of the rule itself, all of them at random."""
    return st.fixed_dictionaries({name: values(kind, name) for name in kind._hyperparameters})
