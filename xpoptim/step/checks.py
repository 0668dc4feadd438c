"""The checks that come before a step writes anything."""

from __future__ import annotations

import numpy as np

from ..arrays.leaves import Leaf, replaced, resolve_gradient, resolve_parameter
from ..arrays.memory import Written, extent, overlapping_pair, overlaps_itself
from ..trace.sums import add_in_order

Memory = tuple[tuple[object, ...], ...]  # address, shape, strides and size of an element of what is written


def resolve(leaves: list[Leaf], *, writing: bool | None) -> list[Leaf]:
    """Fill in every leaf's arrays. ``writing`` puts copies in the place of parameters if False; None does neither."""
    for leaf in leaves:
        resolve_parameter(leaf, writing=bool(writing))
        resolve_gradient(leaf)
        if writing is False and not replaced(leaf):
            leaf.p = leaf.library.copied(leaf.p)
    return leaves


def check_memory(leaves: list[Leaf], known: Memory | None) -> Memory:
    """Refuse parameters that share memory; what was found good is returned, to be ``known`` the next time."""
    memory = [(leaf.named("params"), extent(leaf.p)) for leaf in leaves if leaf.mutable]
    memory += [(f"a slot of {x.named('params')}", extent(slot)) for x in leaves if x.mutable for slot in x.slots]
    written = [(name, a) for name, a in memory if a is not None]
    key = tuple((a.ctypes.data, a.shape, a.strides, a.itemsize) for _, a in written)
    if key == known and len(written) == len(memory):  # an array that does not say where it lies may be another
        return known
    _refuse_identical(leaves)
    for leaf in leaves:
        place = extent(leaf.p) if leaf.mutable else None
        if place is not None and not place.flags.writeable:
            raise ValueError(f"{leaf.named('params')} is read-only: pass a writable copy, or use apply")
        if leaf.mutable and overlaps_itself(leaf.p):
            raise ValueError(
                f"{leaf.named('params')} has elements that share their memory (as after expanding): pass a copy"
            )
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
            leaf.g = leaf.library.copied(leaf.g)


def _refuse_identical(leaves: list[Leaf]) -> None:
    """One mutable array under two keys, also where the library does not tell where its memory lies."""
    seen: dict[int, str] = {}
    for leaf in leaves:
        if leaf.mutable and not replaced(leaf):
            if id(leaf.given) in seen and leaf.given.shape != () and 0 not in leaf.given.shape:
                first, second = seen[id(leaf.given)], leaf.named("params")
                raise ValueError(f"{first} and {second} are the same array: they share memory; pass it once")
            seen[id(leaf.given)] = leaf.named("params")


def finite_norm(names: dict[str, str], sums: dict[str, float]) -> float:
    """The global norm from each leaf's sum of squares; an error that names the first bad leaf if it is not finite.

    ``names`` maps the leaves' keys, in their order, to how errors spell their gradients.
    """
    total = add_in_order([sums[key] for key in sorted(sums)])
    if not np.isfinite(total):
        bad = next((name for key, name in names.items() if not np.isfinite(sums.get(key, 0.0))), None)
        place = f"{bad} holds inf or NaN, or values too large to square" if bad else "the sum over the arrays overflows"
        raise FloatingPointError(f"the norm of the gradients is {np.sqrt(total)}: {place}; nothing was changed")
    return float(np.sqrt(total))
