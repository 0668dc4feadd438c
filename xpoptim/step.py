"""One step over the leaves of a container: every check, then every write."""

from __future__ import annotations

from typing import Any

import numpy as np

from .engines import reference
from .engines.selection import selected
from .fusion.norm import add_in_order
from .leaves import Leaf, named, replaced, resolve_gradient, resolve_parameter
from .memory import Written, copied, extent, overlapping_pair
from .recipe import Recipe


def check(leaves: list[Leaf], *, writing: bool) -> None:
    """Resolve every leaf; if the step must leave the parameters alone, put copies in their place."""
    for leaf in leaves:
        resolve_parameter(leaf, writing=writing)
        resolve_gradient(leaf)
        if not writing and not replaced(leaf):
            leaf.p = copied(leaf.p)


def check_memory(leaves: list[Leaf], known: Any) -> Any:
    """Refuse parameters that share memory; what was found good is returned, to be ``known`` the next time."""
    memory = [(named("params", leaf.key), extent(leaf.p)) for leaf in leaves if leaf.mutable]
    written = [(name, a) for name, a in memory if a is not None]
    key = tuple((a.ctypes.data, a.shape, a.strides) for _, a in written)
    if key == known:
        return known
    _refuse_identical(leaves)
    pair = overlapping_pair(written)
    if pair:
        raise ValueError(
            f"{pair[0]} and {pair[1]} share memory: pass one of them, or copies "
            "(an update of the one would change the other)"
        )
    return key


def copy_overlapping_gradients(leaves: list[Leaf]) -> None:
    """A gradient that lies in memory to be written acts as if it had been copied first: so it is."""
    arrays = [extent(a) for leaf in leaves if leaf.mutable for a in (leaf.p, *leaf.slots)]
    memory = Written([a for a in arrays if a is not None])
    for leaf in leaves:
        place = extent(leaf.g) if leaf.g is not None else None
        if place is not None and memory.touches(place):
            leaf.g = copied(leaf.g)


class Step:
    """A recipe over checked leaves. Making one may raise and writes nothing; `run` writes."""

    def __init__(self, recipe: Recipe, leaves: list[Leaf], values: list[float]) -> None:
        self.recipe, self.leaves, self.values = recipe, leaves, values
        self.fused, self.others = _divided(recipe, leaves)
        self.plan = self._plan()
        _trace_all(recipe, self.others)
        if recipe.reductions:
            self.values = [*values, self._norm()]

    def _plan(self) -> Any:
        if not self.fused:
            return None
        from .engines.cpu import Plan

        return Plan(self.recipe, self.fused)

    def _norm(self) -> float:
        scalars = dict(zip(self.recipe.inputs, self.values, strict=False))
        sums: dict[str, float] = {}
        if self.plan is not None:
            odd = {i: x.g for i, x in enumerate(self.fused) if x.g is not None and not x.g.flags.c_contiguous}
            squares = self.plan.squares(self.values, odd)
            sums = dict(zip((x.key for x in self.fused), squares.tolist(), strict=True))
        sums |= {leaf.key: reference.squares_sum(self.recipe, leaf, scalars) for leaf in self.others}
        return finite_norm([leaf.key for leaf in self.leaves], sums)

    def run(self) -> None:
        """Write parameters and slots; immutable leaves get new arrays instead."""
        if self.plan is not None:
            self.plan.run(self.values)
        scalars = dict(zip(self.recipe.inputs, self.values, strict=True))
        for leaf in self.others:
            reference.step(self.recipe, leaf, scalars)

    def ready(self) -> Any:
        """What the next step can start from, if every leaf was one plain array after the other; else None."""
        if self.plan is None or len(self.fused) != len(self.leaves):
            return None
        from .engines.ready import Ready

        return Ready(self.recipe, self.plan, self.leaves) if Ready.possible(self.leaves) else None


def _divided(recipe: Recipe, leaves: list[Leaf]) -> tuple[list[Leaf], list[Leaf]]:
    """The leaves for the fused engine, and those with a gradient for the reference engine."""
    engine = selected()
    fused, others = [], []
    for leaf in leaves:
        reason = _obstacle(recipe, leaf)
        if reason and engine == "fused" and leaf.g is not None:
            raise ValueError(
                f'{named("params", leaf.key)} cannot take the fused path: {reason} (xo.engine("auto") allows it)'
            )
        if not reason and engine != "reference":
            fused.append(leaf)
        elif leaf.g is not None:
            others.append(leaf)
    return fused, others


def _obstacle(recipe: Recipe, leaf: Leaf) -> str:
    if not recipe.fused:
        return f"{recipe.name} says fused = False: it is plain Array API code"
    if leaf.space != "numpy":
        return f"there is no fused engine for {leaf.space} arrays"
    from .engines.cpu import obstacle

    return obstacle(leaf)


def engine_for(recipe: Recipe, leaf: Leaf, with_gradient: bool) -> tuple[str, str]:
    if with_gradient and leaf.g is None:
        return "none", "its gradient is None: left as it is"
    if selected() == "reference":
        return "reference", 'chosen by xo.engine("reference") or XPOPTIM_ENGINE'
    reason = _obstacle(recipe, leaf)
    if reason:
        return "reference", reason
    if replaced(leaf):
        kind = (
            "a Python float"
            if isinstance(leaf.given, float) and not isinstance(leaf.given, np.generic)
            else "a NumPy scalar"
        )
        return "fused", f"{kind}, through an array of its own; replaced in its container"
    return "fused", "dense NumPy arrays of equal layout"


def _trace_all(recipe: Recipe, leaves: list[Leaf]) -> None:
    """Trace the rule for leaves that no kernel is made for: what cannot be traced is an error on every engine."""
    if not recipe.fused or not leaves:
        return
    for dtype, g_dtype in {(leaf.dtype, leaf.g_dtype) for leaf in leaves}:
        recipe.programs(dtype, g_dtype)


def _refuse_identical(leaves: list[Leaf]) -> None:
    """One mutable array under two keys, also where the library does not tell where its memory lies."""
    seen: dict[int, str] = {}
    for leaf in leaves:
        if leaf.mutable and not replaced(leaf):
            if id(leaf.given) in seen and leaf.given.shape != () and 0 not in leaf.given.shape:
                first, second = named("params", seen[id(leaf.given)]), named("params", leaf.key)
                raise ValueError(f"{first} and {second} are the same array: they share memory; pass it once")
            seen[id(leaf.given)] = leaf.key


def finite_norm(keys: list[str], sums: dict[str, float]) -> float:
    """The global norm from each leaf's sum of squares; an error that names the first bad leaf if it is not finite."""
    total = add_in_order([sums[key] for key in sorted(sums)])
    if not np.isfinite(total):
        bad = next((key for key in keys if not np.isfinite(sums.get(key, 0.0))), None)
        place = (
            f"{named('grads', bad)} holds inf or NaN, or values too large to square" if bad else "their sum overflows"
        )
        raise FloatingPointError(f"the norm of the gradients is {np.sqrt(total)}: {place}; nothing was changed")
    return float(np.sqrt(total))
