"""A step that is ready to run again: the plan of the last one, and what must not have changed since."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays.leaves import Leaf, Skeleton, as_given, gather, replaced, skeleton
from ..recipe.recipe import Recipe


class _Box:
    """The arrays that stand for a number among the parameters and for its gradient."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = replace(leaf, g=None, slots=[])  # without them: nothing keeps a gradient alive
        self.index, self.p, self._g = leaf.index, leaf.p, np.zeros_like(leaf.g)
        numbers = (float, int) if self._g.dtype == np.float64 else ()
        self._kinds = (*numbers, self._g.dtype.type)

    def gradient(self, p: Any, g: Any) -> Any:
        """Take both values in; return the gradient as an array or None. ``TypeError``: they are of another kind now."""
        if type(p) is not type(self._leaf.given):
            raise TypeError
        self.p[()] = p
        if g is None or type(g) is np.ndarray:
            return g
        if type(g) not in self._kinds:
            raise TypeError
        self._g[()] = g
        return self._g

    @property
    def value(self) -> Any:
        return as_given(self._leaf)


class Ready:
    """For arrays of one engine. ``watch`` compares the arrays, ``skeleton`` the containers around them.

    ``direct``, where there is one, makes the whole step in one call. ``copies`` are gradients that the plan reads in
    place of those of other layout, by the leaves' places; ``boxes`` stand for numbers, likewise.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Any,
        leaves: list[Leaf],
        watch: Any,
        skeleton: Skeleton,
        *,
        direct: Any = None,
        copies: dict[int, Any] | None = None,
        boxes: dict[int, _Box] | None = None,
    ) -> None:
        self.recipe, self.plan, self._watch, self.direct = recipe, plan, watch, direct
        self.keys = [leaf.key for leaf in leaves]
        self.gradient_names = {leaf.key: leaf.named("grads") for leaf in leaves}
        self.on_gpu = leaves[0].space == "cupy"
        self._shape, self._copies, self._boxes = skeleton, copies or {}, boxes or {}
        self._odd = [i for i, x in enumerate(leaves) if x.g is not None and not x.g.flags.c_contiguous]

    def columns(self, params: Any, grads: Any, slots: dict[str, dict[str, Any]]) -> list[list[Any]] | None:
        """Parameters, gradients and slots as lists, if the containers are nested as they were; None otherwise.

        The lists are ours: whoever changes a container meanwhile does not free arrays that a kernel works on.
        """
        columns: list[list[Any]] = [[], []]
        if not gather(params, self._shape, columns[0], exact=True) or not gather(grads, self._shape, columns[1]):
            return None
        if self._boxes and not (isinstance(params, dict | list) and self._filled(columns)):
            return None
        for name in self.recipe.slots:
            arrays = slots.get(name) if isinstance(slots, dict) else None
            if not isinstance(arrays, dict) or len(arrays) != len(self.keys):
                return None
            columns.append(list(arrays.values()) if list(arrays) == self.keys else [arrays.get(k) for k in self.keys])
        return columns

    def _filled(self, columns: list[list[Any]]) -> bool:
        """Put arrays in the place of numbers. False if that cannot be done: the full step says why."""
        try:
            for i, box in self._boxes.items():
                columns[1][i] = box.gradient(columns[0][i], columns[1][i])
                columns[0][i] = box.p
        except (TypeError, OverflowError):
            return False
        return True

    def run(self, values: list[float], params: Any, columns: list[list[Any]], made: Any) -> None:
        """Run the plan and put the new numbers in the place of the old ones; for ``made`` see `cpu.Plan.run`."""
        try:
            self.plan.run(values, made)
        finally:  # also if a signal handler raised right after the kernels
            for i, box in self._boxes.items() if made.value else ():
                if columns[1][i] is not None:
                    params[box.index] = box.value

    def unchanged(self, columns: list[list[Any]]) -> bool:
        """Whether the arrays are what they were; the plan is then up to date with where the gradients lie."""
        return self._watch.unchanged(tuple(columns))

    def copy(self, columns: list[list[Any]]) -> None:
        """Bring the gradients of other layout to where the plan reads them."""
        for i, copy in self._copies.items():
            if columns[1][i] is not None:
                copy[...] = columns[1][i]

    def odd(self, columns: list[Any]) -> dict[int, Any]:
        """The gradients that do not lie in C order."""
        return {i: columns[1][i] for i in self._odd if columns[1][i] is not None}


def ready(
    recipe: Recipe, plan: Any, leaves: list[Leaf], params: Any, grads: list[Any], slots: dict[str, dict[str, Any]]
) -> Ready | None:
    """What the next step can start from, if every leaf was a plain array; else None.

    ``grads`` are the gradients as they were given: some ``leaves`` may have copies of other layout.
    """
    numbers = {i for i, x in enumerate(leaves) if replaced(x)}
    if any(x.p is not x.given for i, x in enumerate(leaves) if i not in numbers):
        return None
    columns = [[x.p for x in leaves], grads]
    columns += [[x.slots[k] for x in leaves] for k in range(len(recipe.slots))]
    if leaves[0].space == "cupy":
        from ..engines.cuda.plan import Watch

        return Ready(recipe, plan, leaves, Watch(plan, columns), skeleton(params))
    from ..engines.cpu import scan

    if not scan.available() or any(type(x.p) is not np.ndarray for x in leaves):
        return None
    if any(leaves[i].home is not params or leaves[i].g is None for i in numbers):
        return None
    copies = {i: x.g for i, x in enumerate(leaves) if x.g is not grads[i]}
    cells, lengths = plan.cells()
    for i in copies:
        cells[1][i] = scan.nowhere()
    keys = [list(slots[name]) for name in recipe.slots]  # the objects themselves: they are compared by identity
    scanner = scan.Scanner(columns, [[leaf.index for leaf in leaves]] * 2 + keys, cells, lengths)
    in_order = all([leaf.key for leaf in leaves] == names for names in keys)
    direct = _direct(plan, scanner, leaves, params) if in_order and not copies and not numbers else None
    boxes = {i: _Box(leaves[i]) for i in numbers}
    return Ready(recipe, plan, leaves, scanner, skeleton(params), direct=direct, copies=copies, boxes=boxes)


def _direct(plan: Any, scanner: Any, leaves: list[Leaf], params: Any) -> Any:
    """For a flat container whose step is one pass."""
    from ..engines.cpu import scan

    flat = type(params) in (dict, list) and all(leaf.home is params for leaf in leaves)
    if not flat or plan.calls.keys() != {"update"}:
        return None
    return scan.Direct(scanner, type(params), plan.calls["update"], plan.elements)
