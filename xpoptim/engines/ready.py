"""A step that is ready to run again: the plan of the last one, and what must not have changed since."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..leaves import Leaf, flat_leaves
from ..recipe import Recipe
from . import scan
from .cpu import Plan


class Ready:
    """For flat dicts and lists of plain NumPy arrays; `scan` compares the arrays themselves."""

    def __init__(self, recipe: Recipe, plan: Plan, leaves: list[Leaf]) -> None:
        self.recipe, self.plan = recipe, plan
        self.keys = [leaf.key for leaf in leaves]
        self._odd = [i for i, x in enumerate(leaves) if x.g is not None and not x.g.flags.c_contiguous]
        self._names = [leaf.index for leaf in leaves] if isinstance(leaves[0].home, dict) else None
        columns = [[x.p for x in leaves], [x.g for x in leaves]]
        columns += [[x.slots[k] for x in leaves] for k in range(len(recipe.slots))]
        written = [a for j, column in enumerate(columns) if j != 1 for a in column]
        cells, lengths = plan.cells()
        self._scanner = scan.Scanner(columns, cells, lengths, written)

    @staticmethod
    def possible(leaves: list[Leaf]) -> bool:
        """Whether every leaf is a plain array in one flat dict or list, and the machine lets us scan."""
        home = leaves[0].home
        flat = type(home) in (dict, list) and len(home) == len(leaves) and all(x.home is home for x in leaves)
        return flat and all(x.p is x.given and type(x.p) is np.ndarray for x in leaves) and scan.available()

    def columns(self, params: Any, grads: Any, slots: dict[str, dict[str, Any]]) -> list[Any] | None:
        """Parameters, gradients and slots as lists, if all are what they were; None otherwise."""
        count = len(self.keys)
        if len(params) != count:
            return None
        columns = [flat_leaves(params, self._names, count), flat_leaves(grads, self._names, count)]
        columns += [flat_leaves(slots.get(name), self.keys, count) for name in self.recipe.slots]
        known = [column for column in columns if column is not None]
        if len(known) != len(columns) or not self._scanner.unchanged(tuple(known)):
            return None
        return known

    def odd(self, columns: list[Any]) -> dict[int, Any]:
        """The gradients that do not lie in C order."""
        return {i: columns[1][i] for i in self._odd if columns[1][i] is not None}
