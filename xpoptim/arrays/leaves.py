"""Nested containers <-> flat lists of leaves, and what a leaf may be.

A leaf is an array of any Array API namespace, a NumPy scalar or a Python float. Its key is its
path joined by dots, ``"encoder.0.W"``; a lone array's key is ``"param"``.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar

import numpy as np

from ..errors import habits
from .dtypes import COMPLEX_DTYPES, REAL_DTYPES
from .namespaces.libraries import NUMPY, Library
from .namespaces.lookup import dtype_name, library_of
from .types import Array

_LONE = "param"
_CONTAINERS = (dict, list, tuple)
Container: TypeAlias = dict[Any, object] | list[object] | tuple[object, ...]
_Entries: TypeAlias = Iterator[tuple[object, Any]]
_T = TypeVar("_T")
_A = TypeVar("_A", bound=Array)
_UNRESOLVED: Any = None


@dataclass(slots=True)
class Leaf(Generic[_A]):
    """One parameter with its gradient and slots, on its way through a step."""

    key: str
    given: Any  # as it stands in the user's container
    home: Container | None  # that container, or None for a lone array
    index: object  # its place there
    p: _A = _UNRESOLVED  # the array to be updated: `given`, or a 0-d array made of a number
    g: Any = None  # the gradient as an array, or None
    slots: list[_A] = field(default_factory=list)
    library: Library = NUMPY
    dtype: str = ""
    g_dtype: str = ""

    def named(self, tree: str) -> str:
        """How errors spell the leaf: ``grads['W1']``, or ``grads`` where that is a lone array."""
        return f"{tree}[{self.key!r}]" if self.home is not None else tree

    @property
    def mutable(self) -> bool:
        """Whether `p` can be written to: JAX arrays cannot, the 0-d array of a number can."""
        return self.library.mutable


# ---------------------------------------------------------------------------------------------------------------------
# Containers


def pairs(params: object, grads: object) -> list[Leaf]:
    """Walk ``params`` with ``grads`` beside it; every leaf once, in the containers' order.

    Raises ``ValueError`` for a missing gradient, lists of unequal length, two paths with one key, or a container that
    contains itself; ``TypeError`` where ``params`` and ``grads`` are nested differently.
    """
    leaves = list(_walk(params, grads))
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.key in seen:
            raise ValueError(
                f"two paths in params have the key {leaf.key!r}: rename one (keys are paths joined by dots)"
            )
        seen.add(leaf.key)
    return leaves


ABSENT = object()  # in place of `grads` where there are none, as in `init`


def _walk(params: object, grads: Any) -> Iterator[Leaf]:
    """Depth first, and without recursion: containers may be nested deeper than Python lets calls be."""
    if not isinstance(params, _CONTAINERS):
        yield Leaf(_LONE, params, None, None, g=grads)
        return
    wrong = _nested_otherwise(params, grads, [])
    if wrong is not None:
        raise wrong
    path: list[str] = []
    above = {id(params): 0}  # the containers along the path, and how deep they are
    unfinished: list[tuple[Container, Any, Exception | None, _Entries]] = [(params, grads, None, _entries(params))]
    while unfinished:
        home, beside, wrong, entries = unfinished[-1]
        for key, value in entries:
            inner = isinstance(value, _CONTAINERS)
            if inner and not value:
                continue
            path.append(str(key))
            here = wrong or _missing(beside, key, path)
            g = ABSENT if here is not None or beside is ABSENT else beside[key]
            if inner:
                _refuse_circle(value, path, above)
                # What is wrong with the gradients of a container is an error once there is a parameter in it.
                here = here or _nested_otherwise(value, g, path)
                above[id(value)] = len(path)
                unfinished.append((value, g, here, _entries(value)))
                break
            if here is not None:
                raise here
            yield Leaf(".".join(path), value, home, key, g=g)
            path.pop()
        else:
            unfinished.pop()
            del above[id(home)], path[-1:]


def _entries(container: Container) -> _Entries:
    return iter(container.items() if isinstance(container, dict) else enumerate(container))


def _refuse_circle(container: Container, path: list[str], above: dict[int, int]) -> None:
    depth = above.get(id(container))
    if depth is not None:
        raise ValueError(
            f"{where('params', path)} is {where('params', path[:depth])} again: a container that contains itself "
            "has no end; leave that entry out"
        )


def _nested_otherwise(params: Container, grads: Any, path: list[str]) -> Exception | None:
    if grads is ABSENT:
        return None
    if not isinstance(grads, dict if isinstance(params, dict) else list | tuple):
        return TypeError(
            f"{where('params', path)} is {_kind(params)} but {where('grads', path)} is {_kind(grads)}: "
            f"{habits.instead(grads) or 'nest them alike'}"
        )
    if not isinstance(params, dict) and len(grads) != len(params):
        return ValueError(
            f"{where('grads', path)} has {len(grads)} entries but {where('params', path)} has {len(params)}: "
            "they must have equal length (None stands for no gradient)"
        )
    return None


def _missing(grads: object, key: object, path: list[str]) -> Exception | None:
    if grads is ABSENT or not isinstance(grads, dict) or key in grads:
        return None
    known = ", ".join(map(str, grads)) or "none"
    return ValueError(
        f"{where('grads', path)} is missing (gradients there: {known}): "
        "give every parameter a gradient, or None to leave it as it is"
    )


def where(tree: str, path: list[str]) -> str:
    """How errors spell a place: ``grads['W1']``, or ``grads`` itself."""
    return f"{tree}[{'.'.join(path)!r}]" if path else tree


def _kind(x: object) -> str:
    if x is None:
        return "None (which stands for the gradient of one array only)"
    name = type(x).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def rebuilt(params: _T, values: Iterator[object]) -> _T:
    """A container like ``params`` with the next value in the place of each leaf."""
    whole: list[Any] = []
    # Containers, what is left of their entries, and their new ones.
    unfinished: list[tuple[Any, Iterator[object], list[object]]] = [(None, iter([params]), whole)]
    while unfinished:
        container, entries, made = unfinished[-1]
        for value in entries:
            if isinstance(value, _CONTAINERS):
                unfinished.append((value, iter(value.values() if isinstance(value, dict) else value), []))
                break
            made.append(next(values))
        else:
            unfinished.pop()
            if unfinished:
                unfinished[-1][2].append(_like(container, made))
    return whole[0]


def _like(container: Any, entries: list[Any]) -> object:
    if isinstance(container, dict):
        copy = container.copy()
        for key, value in zip(container, entries, strict=True):
            copy[key] = value
        return copy
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*entries)
    return type(container)(entries)


class Nesting(NamedTuple):
    """To unfold a container is to list it, and behind it the entries of each container in that list.

    ``containers`` are their places in the list, each with the keys of a dict or None, and the number of entries;
    ``leaves`` takes the leaves out of the list, in their order. ``flat``: they are the entries of the only container.
    """

    containers: list[tuple[int, list[object] | None, int]]
    leaves: Callable[[list[object]], Iterable[object]]
    flat: bool


def nestings(params: object) -> tuple[Nesting, Nesting]:
    """How parameters are nested, and gradients have to be: these may lack containers that hold no parameter."""
    whole, bare = _nesting(params, {})
    return whole, _nesting(params, bare)[0] if bare else whole


def _nesting(tree: object, without: dict[int, object]) -> tuple[Nesting, dict[int, object]]:
    """How a container is nested, and those within it, by their `id`, that hold no leaf. ``without`` are left out."""
    containers: list[tuple[int, list[object] | None, int]] = []
    places: list[int] = []
    bare: dict[int, object] = {}
    length = 1
    unfinished: list[tuple[object, Iterator[tuple[int, object]], int]] = [(None, iter([(0, tree)]), 0)]
    above = set()  # a schedule can have made a circle of what was none: then it will not be met alike
    while unfinished:
        container, entries, before = unfinished[-1]
        for place, value in entries:
            if id(value) in without:
                continue
            if isinstance(value, _CONTAINERS) and id(value) not in above:
                keys, inner = (list(value), list(value.values())) if isinstance(value, dict) else (None, list(value))
                if without and keys is not None:
                    keys = [key for key, entry in zip(keys, inner, strict=True) if id(entry) not in without]
                    inner = [entry for entry in inner if id(entry) not in without]
                containers.append((place, keys, len(inner)))
                unfinished.append((value, enumerate(inner, length), len(places)))
                above.add(id(value))
                length += len(inner)
                break
            places.append(place)
        else:
            unfinished.pop()
            above.discard(id(container))
            if len(places) == before and len(unfinished) > 1:
                bare[id(container)] = container
    start, stop = (places[0], places[-1] + 1) if places else (0, 0)
    in_a_row = places == list(range(start, stop))
    taken = operator.itemgetter(slice(start, stop)) if in_a_row else operator.itemgetter(*places)
    return Nesting(containers, taken, len(containers) == 1 and len(places) == length - 1), bare


def gather(tree: object, nesting: Nesting, leaves: list[Any], *, exact: bool = False) -> bool:
    """Append the leaves of a container nested in this way; False if it is not. ``exact``: in this way and no other."""
    if not nesting.containers:
        leaves.append(tree)
        return True
    unfolded = [tree]
    for place, keys, length in nesting.containers:
        container = unfolded[place]
        if keys is None:
            if not isinstance(container, list | tuple):
                return False
            entries = list(container)
        elif not isinstance(container, dict) or (exact and len(container) != length):
            return False
        elif len(container) == length and list(container) == keys:
            entries = list(container.values())
        else:  # to ask a defaultdict for what it lacks would fill it
            entries = [container[key] for key in keys if key in container]
        if len(entries) != length:
            return False
        if nesting.flat:
            leaves += entries
            return True
        unfolded += entries
    leaves += nesting.leaves(unfolded)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def _is_number(x: object) -> bool:
    return isinstance(x, numbers.Number) and not isinstance(x, np.generic)


def resolve_parameter(leaf: Leaf, *, writing: bool) -> None:
    """Fill in the leaf's array, namespace and dtype; refuse what cannot be a parameter."""
    name, given = leaf.named("params"), leaf.given
    if isinstance(given, bool | int) or (isinstance(given, np.generic) and given.dtype.kind in "iub"):
        raise TypeError(f"{name} is the integer {given!r}: parameters are floats; write it as one")
    if isinstance(given, complex) and not isinstance(given, np.generic):
        raise TypeError(f"{name} is a Python complex: use np.complex128({given!r}) or an array")
    is_number = isinstance(given, float | np.generic)
    leaf.p = np.array(given) if is_number else given
    library = library_of(leaf.p)
    if library is None:
        _not_a_parameter(leaf)
    _refuse_masked(name, given)
    leaf.library, leaf.dtype = library, dtype_name(leaf.p)
    _check_dtype(name, leaf.dtype, REAL_DTYPES + COMPLEX_DTYPES)
    if not is_number:
        leaf.p = library.plain(given)
    if is_number or not library.mutable:
        _needs_home(leaf, writing)
    elif writing and not library.writable(leaf.p):
        raise ValueError(f"{name} is read-only and cannot be updated in place: pass a writable copy, or use apply")


def _refuse_masked(name: str, given: object) -> None:
    masked = sys.modules.get("numpy.ma")  # NumPy loads it when it is first asked for: nobody has one before that
    if masked is not None and isinstance(given, masked.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask an update would not heed: pass its .data")


def _not_a_parameter(leaf: Leaf) -> NoReturn:
    if leaf.given is None and leaf.home is None:
        raise TypeError(
            "params is None: update writes into the arrays and returns None, "
            "so write opt.update(params, grads) by itself and not params = opt.update(...)"
        )
    advice = habits.instead(leaf.given) or (
        "a parameter is an array of an Array API namespace, a NumPy scalar or a float, "
        "and parameters are nested in dicts, lists and tuples"
    )
    raise TypeError(f"{leaf.named('params')} is {'None' if leaf.given is None else _kind(leaf.given)}: {advice}")


def _needs_home(leaf: Leaf, writing: bool) -> None:
    """A number or an immutable array cannot be written to: `update` puts a new one in its dict or list."""
    if writing and not isinstance(leaf.home, dict | list):
        place = "stands alone" if leaf.home is None else "stands in a tuple"
        raise TypeError(
            f"{leaf.named('params')} is immutable ({type(leaf.given).__name__}) and {place}, "
            "so update cannot replace it: "
            "put it in a dict or list, or use params, state = opt.apply(params, grads, state)"
        )


def _check_dtype(name: str, dtype: str, allowed: tuple[str, ...]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} has dtype {dtype}: allowed are {', '.join(allowed)} (convert it with astype)")


def resolve_gradient(leaf: Leaf) -> None:
    """Fill in the gradient's array and dtype; refuse what does not fit the parameter."""
    g = leaf.g
    if g is None or g is ABSENT:
        leaf.g = None
        return
    name, of = leaf.named("grads"), leaf.named("params")
    if _is_number(g):
        g = _number_gradient(leaf, g, name)
    library = library_of(g)
    if library is None:
        advice = habits.instead(g) or "a gradient is an array like its parameter, or None"
        raise TypeError(f"{name} is {_kind(g)}: {advice}")
    if library is not leaf.library:
        raise TypeError(
            f"{name} is a {library.name} array but {of} is a {leaf.library.name} array: bring both to one namespace"
        )
    _refuse_masked(name, g)
    leaf.g_dtype = dtype_name(g)
    if leaf.g_dtype in COMPLEX_DTYPES and leaf.dtype not in COMPLEX_DTYPES:
        raise TypeError(f"{name} is complex ({leaf.g_dtype}) but {of} is real ({leaf.dtype}): pass its real part")
    _check_dtype(name, leaf.g_dtype, REAL_DTYPES + (COMPLEX_DTYPES if leaf.dtype in COMPLEX_DTYPES else ()))
    if tuple(g.shape) != tuple(leaf.p.shape):
        raise ValueError(f"{name} has shape {tuple(g.shape)} but {of} has shape {tuple(leaf.p.shape)}")
    here, there = library.device(g), library.device(leaf.p)
    if here != there:
        raise ValueError(f"{name} is on {here} but {of} is on {there}: bring both to one device")
    leaf.g = library.plain(g)


def _number_gradient(leaf: Leaf, g: complex, name: str) -> Array:
    """A Python number as the gradient of a leaf without axes."""
    if isinstance(g, bool):
        raise TypeError(f"{name} is the bool {g}: a gradient is a float")
    if isinstance(g, complex) and leaf.dtype not in COMPLEX_DTYPES:
        raise TypeError(f"{name} is complex ({g!r}) but {leaf.named('params')} is real: pass its real part")
    try:
        g = g if isinstance(g, complex) else float(g)
    except OverflowError:
        raise ValueError(f"{name} is an integer beyond the floats: a gradient is a float") from None
    return leaf.library.number(g, leaf.p)


def replaced(leaf: Leaf) -> bool:
    """Whether the leaf is a number or an immutable array, which `update` replaces in its container."""
    return isinstance(leaf.given, float | np.generic) or not leaf.mutable
