"""A step whose arrays have been checked. It can be run again as long as these are what they were."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import call, setitem
from typing import Any

import numpy as np

from ..arrays.leaves import Leaf, Nesting, gather, nestings, replaced
from ..arrays.memory import dense_alike
from ..arrays.types import Array
from ..engines import blocks
from ..engines.base import Columns, Direct, Engine, Keeper, Made, Plan, Watch
from ..engines.choose import selected
from ..engines.sharing import shares
from ..recipe.recipe import Traced
from .checks import finite_norm


class Prepared:
    """The plans of a step, one for each engine that serves some of the leaves.

    To make one may raise, and writes nothing. `reduced` may raise, too. `run` writes. After `watch`, `again` is all of
    them at once, for arrays that are what they were.
    """

    def __init__(
        self,
        traced: Traced,
        leaves: list[Leaf],
        keeper_of: Callable[[Engine], Keeper | None],
        *,
        capturable: bool,
        in_place: bool,
    ) -> None:
        self.recipe, self.capturable, self._leaves = traced.recipe, capturable, leaves
        self._chosen: tuple[str, ...] = (selected(),)  # the choices of an engine that come to these plans
        self._names = {leaf.key: leaf.named("grads") for leaf in leaves} if traced.recipe.reductions else {}
        self._keys = [leaf.key for leaf in leaves]
        self._plans: list[Plan] = []
        self._keeper: Keeper | None = None
        found = shares(traced.recipe, leaves)
        for share in found:
            keeper = keeper_of(share.engine)
            plan = share.engine.plan(traced, share.leaves, keeper, capturable=capturable, alone=len(found) == 1)
            self._plans.append(plan)
            self._keeper = keeper  # of the only plan, where the step can be run again
        # Whether a device works out the norm and counts the steps.
        self.on_device = bool(self._plans) and all(plan.keeps_sums for plan in self._plans)
        self._complete = len(found) == 1 and len(found[0].leaves) == len(leaves)
        self._staged = [pair for share in found for pair in share.staged]
        numbers = (i for i, leaf in enumerate(leaves) if in_place and replaced(leaf) and leaf.g is not None)
        self._numbers = [_Number(i, leaves[i]) for i in numbers]
        self._homes: Iterable[Any] = [number.home for number in self._numbers]
        self._indices = [number.index for number in self._numbers]
        self._reads = [number.read for number in self._numbers]
        self._look: _Look | None = None

    def reduced(self, inputs: list[float]) -> list[float]:
        """Run the passes before the last. The inputs with what these give, unless an engine keeps that to itself."""
        if not self.recipe.reductions:
            return inputs
        for plan in self._plans:
            plan.set_inputs(inputs)
            plan.run("norm", ctypes.c_int64())
        if self.on_device:
            return inputs
        sums: dict[str, float] = {}
        for plan in self._plans:
            sums |= plan.sums()
        return [*inputs, finite_norm(self._names, sums)]

    def run(self, made: Made, inputs: Sequence[float], numbers_to: object = None) -> None:
        """Write parameters and slots; numbers are replaced in their containers, or in ``numbers_to``."""
        replacing = None
        if self._numbers:  # gone through, it replaces all of them: no signal handler comes in between
            homes = self._homes if numbers_to is None else repeat(numbers_to)
            replacing = map(setitem, homes, self._indices, map(call, self._reads))
        try:
            if len(self._plans) == 1:
                self._plans[0].set_inputs(inputs)
                self._plans[0].run("update", made)
            else:
                self._run_each(made, inputs)
        finally:  # also if a signal handler raised right after the kernels
            if replacing is not None and made.value:
                deque(replacing, maxlen=0)
            if self._staged and made.value:
                try:
                    self._bring_home()
                except BaseException:  # a signal handler's: once again, which gives the same
                    self._bring_home()
                    raise

    def _run_each(self, made: Made, inputs: Sequence[float]) -> None:
        """Run several plans. Once the first has begun, nothing that a signal handler raises keeps back the others."""
        if not self._plans:
            made.value = 1  # over nothing, or nothing with a gradient
        begun = [made, *(ctypes.c_int64() for _ in self._plans[1:])]
        waiting = list(zip(self._plans, begun, strict=False))
        try:
            _run_waiting(waiting, inputs)
        except BaseException:
            if made.value:
                _run_waiting(waiting, inputs)
            raise

    def _bring_home(self) -> None:
        """What was computed in dense copies, into the arrays that they stand for."""
        for leaf, copy in self._staged:
            for old, new in zip((leaf.p, *leaf.slots), (copy.p, *copy.slots), strict=True):
                if new is not old:
                    blocks.copy(old, new)

    # Again

    def watch(self, params: object, slots: dict[str, dict[str, Array]]) -> bool:
        """Remember what must not change for the step to be run again. False if it cannot be.

        The gradients are let go.
        """
        leaves, self._leaves = self._leaves, []
        copies = self._copied_gradients(leaves)
        if not self._complete or len(copies) != len(self._staged) or not leaves:
            return False
        in_arrays = {number.place for number in self._numbers}
        if any(leaf.p is not leaf.given for i, leaf in enumerate(leaves) if i not in in_arrays):
            return False
        if any(number.home is not params for number in self._numbers):
            return False
        columns = [[leaf.p for leaf in leaves], [leaf.g for leaf in leaves]]
        columns += [[leaf.slots[k] for leaf in leaves] for k in range(len(self.recipe.slots))]
        keys = [[leaf.index for leaf in leaves]] * 2 + [list(slots[name]) for name in self.recipe.slots]
        watch = self._plans[0].watch(columns, keys, copies)
        if watch is None:
            return False
        flat = leaves[0].given is params or (
            type(params) in (dict, list) and all(leaf.home is params for leaf in leaves)
        )
        in_order = all(names == self._keys for names in keys[2:])
        direct = None
        if flat and in_order and not copies and not self._numbers:
            direct = self._plans[0].direct(watch, type(params))
        if not copies:  # of the choices that come to a watch, "auto" differs from "fused" in copies alone
            self._chosen = ("auto", "fused")
        self._numbers = [number.without_gradient() for number in self._numbers]
        self._staged, self._homes = [], ()
        self._look = _Look(self.recipe.slots, self._keys, *nestings(params), watch, direct, copies, self._numbers)
        return True

    def _copied_gradients(self, leaves: list[Leaf]) -> dict[int, Array]:
        """The copies of gradients that are dense in their own way, of leaves of which nothing else is a copy."""
        places = {id(leaf): i for i, leaf in enumerate(leaves)}
        return {
            places[id(leaf)]: copy.g
            for leaf, copy in self._staged
            if all(new is old for new, old in zip((copy.p, *copy.slots), (leaf.p, *leaf.slots), strict=True))
            and copy.g.dtype == leaf.g.dtype
            and dense_alike([leaf.g])
        }

    def again(self, made: Made, inputs: list[float], params: object, grads: object, slots: Any) -> bool:
        """The whole step, if nothing has changed that matters; whether it was made."""
        look = self._look
        if look is None or type(slots) is not dict or selected() not in self._chosen:
            return False
        if look.direct is not None and look.direct.run(
            inputs, (params, grads, *map(slots.get, self.recipe.slots)), made
        ):
            return True  # else keys may have come as equal strings, which take a walk
        columns = look.columns(params, grads, slots)  # which hold the arrays while kernels work on them
        if columns is None or not look.unchanged(columns):
            return False
        if self._keeper is None:
            self.run(made, self.reduced(inputs), params)
            return True
        turn = self._keeper.begin(self._plans[0].devices)
        try:
            self.run(made, self.reduced(inputs), params)
        finally:
            self._keeper.end(turn)
        return True


_MUTABLE = (dict, list)  # made once: a quick step asks


@dataclass
class _Look:
    """What must not have changed: the containers, and by an engine's watch the arrays in them."""

    slots: tuple[str, ...]
    keys: list[str]
    params: Nesting
    grads: Nesting
    watch: Watch
    direct: Direct | None
    copies: dict[int, Array]
    numbers: list[_Number]

    def columns(self, params: object, grads: object, slots: Any) -> Columns | None:
        """Parameters, gradients and slots as lists, if the containers are nested as they were; None otherwise.

        The lists are ours: whoever changes a container meanwhile does not free arrays that a kernel works on.
        """
        columns: Columns = [[], []]
        if not gather(params, self.params, columns[0], exact=True) or not gather(grads, self.grads, columns[1]):
            return None
        if self.numbers and not self._filled(columns, params):
            return None
        for name in self.slots:
            arrays = slots.get(name)
            if not isinstance(arrays, dict) or len(arrays) != len(self.keys):
                return None
            if list(arrays) == self.keys:
                columns.append(list(arrays.values()))
            else:
                columns.append([arrays.get(key) for key in self.keys])
        return columns

    def _filled(self, columns: Columns, container: object) -> bool:
        """Put arrays in the place of numbers. False if that cannot be done: the full step says why."""
        params, grads = columns
        try:
            for number in self.numbers:
                i = number.place
                params[i], grads[i] = number.p, number.load(params[i], grads[i])
        except (TypeError, OverflowError):
            return False
        return isinstance(container, _MUTABLE)

    def unchanged(self, columns: Columns) -> bool:
        """Whether the arrays are what they were. Gradients of other layout are then where the plan reads them."""
        if not self.watch.unchanged(columns):
            return False
        for i, copy in self.copies.items():
            if columns[1][i] is not None:
                copy[...] = columns[1][i]
        return True


class _Number:
    """A number or an immutable array among the parameters, to be replaced in its container; ``p`` stands for it."""

    def __init__(self, place: int, leaf: Leaf) -> None:
        self.place, self.home, self.index, self.p, self._kind = place, leaf.home, leaf.index, leaf.p, type(leaf.given)
        self._leaf: Leaf | None = leaf
        self.read: Callable[[], object] = partial(getattr, leaf, "p")
        if issubclass(self._kind, np.generic):
            self.read = partial(self.p.__getitem__, ())
        elif issubclass(self._kind, float):
            self.read = self.p.item

    def without_gradient(self) -> _Number:
        """The same, without a hold on the leaf: nothing keeps a gradient or a container alive."""
        assert self._leaf is not None
        self._g = np.zeros_like(self._leaf.g)
        numbers = (float, int) if self._g.dtype == np.float64 else ()
        self._g_kinds = (*numbers, self._g.dtype.type)
        self._leaf = self.home = None
        return self

    def load(self, p: object, g: Any) -> np.ndarray | None:
        """Take both values in; the gradient as an array. ``TypeError``: they are of another kind now."""
        if type(p) is not self._kind:
            raise TypeError
        self.p[()] = p
        if g is None or type(g) is np.ndarray:
            return g
        if type(g) not in self._g_kinds:
            raise TypeError
        self._g[()] = g
        return self._g


def _run_waiting(plans: list[tuple[Plan, Made]], inputs: Sequence[float]) -> None:
    """Run the plans that have not begun."""
    for plan, begun in plans:
        if not begun.value:
            plan.set_inputs(inputs)
            plan.run("update", begun)
