"""Which engine serves which leaf."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..arrays.leaves import Leaf, replaced
from ..recipe.recipe import Recipe
from . import reference
from .base import Engine, KernelEngine
from .choose import selected
from .registry import kernels_for


@dataclass
class Share:
    """The leaves of a step that one engine serves. ``staged`` are those that it serves through dense copies."""

    engine: Engine
    leaves: list[Leaf] = field(default_factory=list)
    staged: list[tuple[Leaf, Leaf]] = field(default_factory=list)


def shares(recipe: Recipe, leaves: list[Leaf]) -> list[Share]:
    """Every leaf's engine in force. Who has neither a kernel nor a gradient is in no share.

    The reference comes first: unlike a kernel, it may still raise when it computes.
    """
    found: dict[Engine, Share] = {reference.ENGINE: Share(reference.ENGINE)}
    for leaf in leaves:
        kernels, reason = _kernels(recipe, leaf)
        if leaf.g is None and (reason or selected() == "reference"):
            continue
        if reason and selected() == "fused":
            place = leaf.named("params")
            raise ValueError(f'{place} cannot take the fused path: {reason} (xo.engine("auto") allows it)')
        if kernels is None or selected() == "reference":
            found[reference.ENGINE].leaves.append(leaf)
            continue
        share = found.setdefault(kernels, Share(kernels))
        served_leaf = kernels.staged(leaf) if reason else leaf
        if reason:
            share.staged.append((leaf, served_leaf))
        share.leaves.append(served_leaf)
    return [share for share in found.values() if share.leaves]


def served(recipe: Recipe, leaf: Leaf, with_gradient: bool) -> tuple[str, str]:
    """Which engine serves a leaf, and why."""
    if with_gradient and leaf.g is None:
        return "none", "its gradient is None: left as it is"
    if selected() == "reference":
        return "reference", 'chosen by xo.engine("reference") or XPOPTIM_ENGINE'
    kernels, reason = _kernels(recipe, leaf)
    if reason:
        return ("staged", f"{reason}: through dense copies") if kernels else ("reference", reason)
    remark = f"; {kernels.remark()}" if kernels and kernels.remark() else ""
    if replaced(leaf):
        kind = "a NumPy scalar" if isinstance(leaf.given, np.generic) else "a Python float"
        return "fused", f"{kind}, through an array of its own; replaced in its container{remark}"
    return "fused", f"dense {leaf.library.title} arrays of equal layout{remark}"


def _kernels(recipe: Recipe, leaf: Leaf) -> tuple[KernelEngine | None, str]:
    """The engine whose kernels can serve a leaf, or None; and why they cannot serve it as it is, or not at all."""
    if not recipe.fused:
        return None, f"{recipe.name} says fused = False: it is plain Array API code"
    engine = kernels_for(leaf.library)
    if engine is None:
        return None, f"there is no fused engine for {leaf.library.name} arrays"
    reason = engine.obstacle(leaf)
    return (engine if not reason or engine.stageable(leaf) else None), reason
