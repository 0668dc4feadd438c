"""The state of an optimizer, ``{"step": int, "slots": {name: {key: array}}}``: made, checked, copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, cast

import numpy as np

from ..arrays.dtypes import slot_dtype
from ..arrays.leaves import Leaf
from ..arrays.namespaces.lookup import beside, dtype_name, library_with
from ..arrays.types import Array, Shape

Slots = Mapping[str, object]  # names of slots with their start: a number, or a function of the parameter
SlotArrays = dict[str, dict[str, Any]]  # by the slots' names and the parameters' keys: arrays of the user's library
_Known = tuple[str | None, Shape, str, str | None]  # namespace, shape, dtype, device; None if that is not known
Signature = dict[str, _Known]


class State(TypedDict):
    """``step`` counts the applied updates. There are no slots before the first."""

    step: int
    slots: SlotArrays


def signature(leaves: list[Leaf]) -> Signature:
    """What the first step fixes for each leaf."""
    return {
        leaf.key: (leaf.library.name, tuple(leaf.p.shape), leaf.dtype, str(leaf.library.device(leaf.p)))
        for leaf in leaves
    }


def recorded_signature(known: Signature | None) -> dict[str, list[object]] | None:
    """What a state dict tells of the parameters: shapes and dtypes, but neither namespace nor device."""
    return None if known is None else {key: [list(shape), dtype] for key, (_, shape, dtype, _) in known.items()}


def loaded_signature(owner: str, d: Mapping[str, Any]) -> Signature | None:
    """The signature in a state dict; None if it has none, or an empty one of no step yet, which fixes nothing."""
    parameters = d.get("parameters")
    if parameters is None:
        return None
    try:
        if not parameters.keys() and d["step"] == 0:
            return None
        return {key: (None, tuple(shape), str(dtype), None) for key, (shape, dtype) in parameters.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{owner}: 'parameters' in this state dict is not what state_dict records") from None


def check_same_parameters(old: Signature, new: Signature) -> None:
    """The parameters of a state dict must be those of the optimizer."""
    if set(old) != set(new):
        raise ValueError(f"the state dict is of parameters {_listed(new)}, but this optimizer is of {_listed(old)}")
    for key in old:
        _check_alike(repr(key), old[key][1:3], new[key][1:3])


def _check_alike(what: str, ours: tuple[Shape, str], saved: tuple[Shape, str]) -> None:
    if ours != saved:
        raise ValueError(
            f"{what} has shape {saved[0]} and dtype {saved[1]} in the state dict, "
            f"but shape {ours[0]} and dtype {ours[1]} in this optimizer"
        )


def _listed(keys: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, keys))) or "none"


def public_name(cls: type) -> str:
    """How a state dict names a class: ``xpoptim.Adam``, or a user's by module and qualified name."""
    package = __name__.partition(".")[0]
    ours = cls.__module__.partition(".")[0] == package
    return f"{package if ours else cls.__module__}.{cls.__qualname__}"


def check_class(cls: type, given: object) -> None:
    """The class that a state dict names must be this one; a name without a module is compared with the class's own."""
    if not isinstance(given, str):
        raise ValueError(
            f"the entry 'class' in this state dict is of type {type(given).__name__}: "
            f"it must be a name, {public_name(cls)!r}"
        )
    if given in (public_name(cls), cls.__name__):
        return
    same = given.rpartition(".")[2] == cls.__name__
    advice = (
        f"if it is the same class, which has moved, load d | {{'class': {cls.__name__!r}}}"
        if same
        else "load it into that optimizer"
    )
    raise ValueError(f"this state dict is of {given!r}, not of {public_name(cls)!r}: {advice}")


def checked_step(state: State) -> int:
    """The state's step count, which anyone can have written to."""
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"the state's step is {step!r}: it must be an int of at least 0")
    return step


def check_signature(owner: str, known: Signature | None, leaves: list[Leaf]) -> Signature:
    """The leaves' signature, if it is the one known from the step before (or none is)."""
    now = signature(leaves)
    if known is None or now == known:
        return now
    _check_keys(owner, set(now), set(known))
    what = ("namespace", "shape", "dtype", "device")
    for leaf in leaves:
        was_and_is = zip(what, known[leaf.key], now[leaf.key], strict=True)
        changes = [f"{kind} {old}, now {new}" for kind, old, new in was_and_is if old not in (None, new)]
        if changes:
            raise ValueError(
                f"{leaf.named('params')} had {' and '.join(changes)}: these are fixed by the first step "
                f"(or the state dict that was loaded); make a new {owner} for other parameters"
            )
    return now


def fresh_slots(starts: Slots, leaves: list[Leaf]) -> SlotArrays:
    """The slots of leaves before the first step."""
    return {name: {leaf.key: _started(start, leaf, name) for leaf in leaves} for name, start in starts.items()}


def slots_for(
    owner: str, starts: Slots, leaves: list[Leaf], state: State, started: SlotArrays | None = None
) -> SlotArrays:
    """The slots of the state, checked against the leaves and handed to them.

    Before the first step, they are those that were ``started``, or fresh ones.
    """
    slots = state["slots"]
    if not isinstance(slots, dict) or any(not isinstance(slots.get(name, {}), dict) for name in starts):
        raise ValueError(
            f"the state's slots are {slots!r}: they must be {{name: {{key: array}}}}, as {owner} made them"
        )
    if not slots and starts and state["step"] == 0:
        slots = started if started is not None else fresh_slots(starts, leaves)
    for name in starts:
        _check_keys(owner, {leaf.key for leaf in leaves}, set(slots.get(name, ())))
    for leaf in leaves:
        leaf.slots = [_fitting(slots[name][leaf.key], leaf, name) for name in starts]
    # A slot that was brought to its parameter's namespace is a new array: the state will be told.
    for k, name in enumerate(starts):
        if any(leaf.slots[k] is not slots[name][leaf.key] for leaf in leaves):
            slots = slots | {name: {leaf.key: leaf.slots[k] for leaf in leaves}}
    return slots


def _started(start: object, leaf: Leaf, name: str) -> Array:
    """A slot's first value, in the slot's dtype and the parameter's shape, layout and device."""
    with beside(leaf.p):
        return _start_value(start, leaf, name)


def _start_value(start: Any, leaf: Leaf, name: str) -> Array:
    xp = leaf.library.namespace(leaf.p)
    value = start(leaf.p) if callable(start) else start
    zeros = leaf.library.zeros_like(leaf.p, slot_dtype(leaf.dtype))
    if isinstance(value, int | float) and str(float(value)) == "0.0":
        return zeros
    if not hasattr(value, "shape"):
        if not isinstance(value, int | float | complex):
            raise TypeError(f"slot {name!r} of {leaf.named('params')} starts as {value!r}: give a number or an array")
        with np.errstate(over="ignore"):
            return xp.full_like(zeros, value)
    if tuple(value.shape) not in ((), tuple(leaf.p.shape)):
        raise ValueError(
            f"slot {name!r} of {leaf.named('params')} starts with shape {tuple(value.shape)}, "
            f"but the parameter has shape {tuple(leaf.p.shape)}"
        )
    if not leaf.mutable:
        return xp.astype(xp.broadcast_to(value, leaf.p.shape), zeros.dtype)
    zeros[...] = xp.astype(xp.asarray(value), zeros.dtype)
    return zeros


def _check_keys(owner: str, keys: set[str], known: set[str]) -> None:
    """The set of keys is fixed by the first step."""
    if keys != known:
        added, lost = sorted(keys - known), sorted(known - keys)
        change = "; ".join(f"{what} {', '.join(k)}" for what, k in (("new:", added), ("missing:", lost)) if k)
        raise ValueError(
            f"the parameters are not those of {owner}'s state ({change}): they are fixed by the first step; "
            "make a new optimizer for another set"
        )


def _fitting(slot: Any, leaf: Leaf, name: str) -> Array:
    """The slot as an array beside its parameter, if it fits."""
    place = f"slot {name!r} of {leaf.named('params')}"
    if not hasattr(slot, "shape"):
        raise ValueError(
            f"{place} is {type(slot).__name__}, not an array: the state was changed or is of another optimizer"
        )
    if tuple(slot.shape) != tuple(leaf.p.shape) or dtype_name(slot) != slot_dtype(leaf.dtype):
        raise ValueError(
            f"{place} has shape {tuple(slot.shape)} and dtype {dtype_name(slot)}, but the parameter asks for shape "
            f"{tuple(leaf.p.shape)} and dtype {slot_dtype(leaf.dtype)}: shapes and dtypes are fixed by the first step"
        )
    library = library_with(slot)
    here, there = library.device(slot), leaf.library.device(leaf.p)
    if library is leaf.library and here == there:
        if not library.writable(slot):
            raise ValueError(f"{place} is read-only: put a writable array into the state")
        return library.kernels_write(slot)
    slot = library.portable(slot)  # from elsewhere, as where the state was loaded from
    if isinstance(slot, np.ndarray):
        return leaf.library.brought(slot, leaf.p)
    if library is leaf.library:
        raise ValueError(f"{place} is on {here} but the parameter is on {there}")
    raise ValueError(
        f"{place} is a {library.name} array but the parameter is a {leaf.library.name} array: "
        "the namespace is fixed by the first step"
    )


def plain_state(name: str, slots: tuple[str, ...], state: object) -> State:
    """A state as it should be, or a clear error."""
    if not isinstance(state, Mapping) or "step" not in state or "slots" not in state:
        raise ValueError(f"{name}: this is no optimizer state: it needs the entries 'step' and 'slots' (see init)")
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"{name}: the state's step is {step!r}: it must be an int of at least 0")
    if not isinstance(state["slots"], Mapping) or (set(state["slots"]) != set(slots) and (state["slots"] or step)):
        found = _listed(state["slots"]) if isinstance(state["slots"], Mapping) else type(state["slots"]).__name__
        raise ValueError(f"the state has slots {found}, but {name} has {_listed(slots)}: it is of another optimizer")
    if any(not isinstance(arrays, Mapping) for arrays in state["slots"].values()):
        raise ValueError(f"{name}: each slot of a state is a dict {{key: array}}")
    for n, arrays in state["slots"].items():
        bad = next((key for key, a in arrays.items() if not isinstance(key, str) or not hasattr(a, "shape")), None)
        if bad is not None:
            raise ValueError(f"{name}: slot {n!r} has {arrays[bad]!r} for key {bad!r}: it must map str to arrays")
    if any(set(state["slots"][n]) != set(state["slots"][slots[0]]) for n in state["slots"]):
        raise ValueError(f"{name}: the slots of this state have different keys")
    return {"step": int(step), "slots": {n: dict(state["slots"][n]) for n in slots if n in state["slots"]}}


def copied_state(state: State) -> State:
    others = {k: v for k, v in state.items() if k != "slots"}
    slots = _with_each_slot(lambda slot: library_with(slot).copied(slot), state)
    return cast(State, copy.deepcopy(others) | {"slots": slots})


def on_host(state: State) -> State:
    """The state with NumPy arrays in the place of CuPy's, which a pickle would forget the GPU of."""
    return {**state, "slots": _with_each_slot(lambda slot: library_with(slot).portable(slot), state)}


def _with_each_slot(function: Callable[[Array], Array], state: State) -> SlotArrays:
    return {name: {key: function(a) for key, a in slots.items()} for name, slots in state["slots"].items()}


def check_same(old: SlotArrays, new: SlotArrays) -> None:
    """Two sets of slots must have the same keys, shapes and dtypes."""
    for name in old:
        if set(old[name]) != set(new.get(name, ())):
            raise ValueError(
                f"the state dict has slot {name!r} for {', '.join(sorted(new.get(name, ()))) or 'nothing'}, "
                f"but this optimizer has it for {', '.join(sorted(old[name]))}: load it into a new optimizer"
            )
        for key, a in old[name].items():
            ours, saved = ((tuple(x.shape), dtype_name(x)) for x in (a, new[name][key]))
            _check_alike(f"slot {name!r} of {key!r}", ours, saved)
