"""A step that is ready to run again: the plan of the last one, and what must not have changed since."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..leaves import Leaf, flat_leaves
from ..recipe import Recipe


class Ready:
    """For arrays of one engine in a flat dict or list. ``watch`` compares the arrays themselves."""

    def __init__(self, recipe: Recipe, plan: Any, leaves: list[Leaf], watch: Any) -> None:
        self.recipe, self.plan, self._watch = recipe, plan, watch
        self.keys = [leaf.key for leaf in leaves]
        self.gradient_names = {leaf.key: leaf.named("grads") for leaf in leaves}
        self.on_gpu = leaves[0].space == "cupy"
        self._names = [leaf.index for leaf in leaves] if isinstance(leaves[0].home, dict) else None
        self._odd = [i for i, x in enumerate(leaves) if x.g is not None and not x.g.flags.c_contiguous]

    def columns(self, params: Any, grads: Any, slots: dict[str, dict[str, Any]]) -> list[Any] | None:
        """Parameters, gradients and slots as lists, if all are what they were; None otherwise."""
        count = len(self.keys)
        if type(params) not in (dict, list) or len(params) != count:
            return None
        columns = [flat_leaves(params, self._names, count), flat_leaves(grads, self._names, count)]
        columns += [flat_leaves(slots.get(name), self.keys, count) for name in self.recipe.slots]
        known = [column for column in columns if column is not None]
        if len(known) != len(columns) or not self._watch.unchanged(tuple(known)):
            return None
        return known

    def odd(self, columns: list[Any]) -> dict[int, Any]:
        """The gradients that do not lie in C order."""
        return {i: columns[1][i] for i in self._odd if columns[1][i] is not None}


def ready(recipe: Recipe, plan: Any, leaves: list[Leaf]) -> Ready | None:
    """What the next step can start from, if every leaf was one plain array of a flat dict or list; else None."""
    home = leaves[0].home
    flat = type(home) in (dict, list) and len(home) == len(leaves) and all(x.home is home for x in leaves)
    if not flat or any(x.p is not x.given for x in leaves):
        return None
    columns = [[x.p for x in leaves], [x.g for x in leaves]]
    columns += [[x.slots[k] for x in leaves] for k in range(len(recipe.slots))]
    if leaves[0].space == "cupy":
        from .cuda import Watch

        return None if any(g is None for g in columns[1]) else Ready(recipe, plan, leaves, Watch(plan, columns))
    from . import scan

    if not scan.available() or any(type(x.p) is not np.ndarray for x in leaves):
        return None
    return Ready(recipe, plan, leaves, scan.Scanner(columns, *plan.cells()))
