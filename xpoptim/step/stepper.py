"""The steps of one optimizer: what it keeps between them, and the way from a call to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from ctypes import c_int64
from typing import TypeVar

from ..arrays.leaves import ABSENT, Leaf, pairs, rebuilt
from ..arrays.namespaces.lookup import library_with
from ..arrays.types import Array
from ..engines.base import Engine, Keeper, Made
from ..engines.registry import kernels_for
from ..engines.sharing import served
from ..recipe.declaration import Declaration
from ..recipe.recipe import Recipe, Traced
from .checks import Memory, check_memory, copy_overlapping_gradients, resolve
from .prepared import Prepared
from .report import Report, Served
from .state import (
    Signature,
    SlotArrays,
    State,
    check_same,
    check_same_parameters,
    check_signature,
    checked_step,
    copied_state,
    fresh_slots,
    plain_state,
    slots_for,
)

_R = TypeVar("_R")


class Stepper:
    """The state, what is known of the arrays, and the last step. Hyperparameters come with each call: ``settings``."""

    def __init__(self) -> None:
        self.state: State = {"step": 0, "slots": {}}
        self.known: Signature | None = None  # of the parameters: the first step fixes it
        self._traced: Traced | None = None
        self._prepared: Prepared | None = None
        self._memory: Memory | None = None  # where what was written to lies: that no two arrays share it was checked
        self._keepers: dict[Engine, Keeper] = {}

    # Stepping. The user's code runs first: schedules, rules, starts of slots. The arrays are looked at after it.

    def update(self, settings: Declaration, params: object, grads: object) -> None:
        """A step in place: the last one again, or else one that is prepared."""
        state, made = self.state, c_int64()
        recipe, inputs = settings._scalars(checked_step(state))
        last = self._prepared
        same = last is not None and last.recipe is recipe and last.capturable is settings.capturable
        if last is not None and same and self._counted(made, last.again, inputs, params, grads, state["slots"]):
            return
        traced, started = self._tracing(recipe), self._started(settings, params, state)
        leaves = resolve(pairs(params, grads), writing=True)
        with self._turn(leaves):
            known = check_signature(type(settings).__name__, self.known, leaves)
            slots = slots_for(type(settings).__name__, settings._slot_starts(), leaves, state, started)
            self._memory = check_memory(leaves, self._memory)
            copy_overlapping_gradients(leaves)
            prepared = Prepared(traced, leaves, self._keeper, capturable=settings.capturable, in_place=True)
            if not prepared.on_device and self._stopped_counting():
                self.update(settings, params, grads)  # for the right step
                return
            inputs = prepared.reduced(inputs)
            before, state["slots"] = state["slots"], slots
            try:
                self._counted(made, prepared.run, inputs)
            finally:
                if made.value:
                    self._traced, self.known = traced, known
                    try:
                        _keep_immutable(recipe, leaves, slots)
                    except BaseException:  # a signal handler's: once again, which gives the same
                        _keep_immutable(recipe, leaves, slots)
                        raise
                else:
                    state["slots"] = before
        self._prepared = prepared if prepared.watch(params, slots) else None

    def apply(self, settings: Declaration, params: _R, grads: object, state: Mapping[str, object]) -> tuple[_R, State]:
        """A step on copies: new parameters and a new state."""
        state = copied_state(plain_state(type(settings).__name__, settings._slot_names(), state))
        recipe, inputs = settings._scalars(state["step"])
        traced, started = self._tracing(recipe), self._started(settings, params, state)
        leaves = resolve(pairs(params, grads), writing=False)
        self._not_captured(leaves)
        state["slots"] = slots_for(type(settings).__name__, settings._slot_starts(), leaves, state, started)
        copy_overlapping_gradients(leaves)
        prepared = Prepared(traced, leaves, lambda _: None, capturable=False, in_place=False)
        prepared.run(c_int64(), prepared.reduced(inputs))
        self._traced = traced
        _keep_immutable(recipe, leaves, state["slots"])
        state["step"] += 1
        return rebuilt(params, iter([leaf.library.wrapped(leaf.p, leaf.given) for leaf in leaves])), state

    def explain(self, settings: Declaration, params: object, grads: object) -> Report:
        leaves = resolve(pairs(params, ABSENT if grads is None else grads), writing=True)
        check_signature(type(settings).__name__, self.known, leaves)
        slots_for(type(settings).__name__, settings._slot_starts(), leaves, self.state)
        return Report(Served(leaf.key, *served(settings._recipe, leaf, grads is not None)) for leaf in leaves)

    def traced(self, settings: Declaration) -> Traced:
        """What the next step carries out."""
        return self._tracing(settings._recipe)

    def _tracing(self, recipe: Recipe) -> Traced:
        """The traced recipe: that of the steps before, unless what changes the program was assigned since."""
        return self._traced if self._traced is not None and self._traced.recipe == recipe else Traced(recipe)

    def _started(self, settings: Declaration, params: object, state: State) -> SlotArrays | None:
        """The slots before the first step, if functions of the user's start some."""
        starts = settings._slot_starts()
        if state["slots"] or state["step"] or not any(map(callable, starts.values())):
            return None
        leaves = resolve(pairs(params, ABSENT), writing=None)
        self._not_captured(leaves)  # a start allocates
        return fresh_slots(starts, leaves)

    def _counted(self, made: Made, run: Callable[..., _R], *arguments: object) -> _R:
        """``run(made, *arguments)``, and the step is counted if it was made.

        It is counted first: Ctrl-C during the kernels takes effect after them, and must find the step counted.
        """
        state = self.state
        state["step"] += 1
        try:
            return run(made, *arguments)
        finally:
            if not made.value:
                state["step"] -= 1

    # Devices

    def _keeper(self, engine: Engine) -> Keeper | None:
        keeper = self._keepers.get(engine) or engine.keeper()
        if keeper is not None:
            self._keepers[engine] = keeper
        return keeper

    def _keepers_of(self, arrays: list[Array]) -> list[tuple[Keeper, set[int]]]:
        """The keepers of all engines so far and of those of some arrays, with these arrays' devices."""
        for library in {library_with(array) for array in arrays}:
            engine = kernels_for(library)
            if engine is not None:
                self._keeper(engine)
        return [(keeper, keeper.devices_of(arrays)) for keeper in self._keepers.values()]

    def _not_captured(self, leaves: list[Leaf]) -> list[tuple[Keeper, set[int]]]:
        """The same for a step in full, which cannot be captured into a graph."""
        found = self._keepers_of([leaf.p for leaf in leaves])
        for keeper, devices in found:
            keeper.refuse_capture(devices)
        return found

    def _turn(self, leaves: list[Leaf]) -> AbstractContextManager[None]:
        """A step in full, whose plan takes the place of the last one's."""
        turns = self._not_captured(leaves)
        self.release()
        return _within(keeper.taken(devices) for keeper, devices in turns)

    def apart(self, what: str, state: State) -> AbstractContextManager[None]:
        """What is done with a state between steps."""
        return _within(keeper.apart(what, devices) for keeper, devices in self._keepers_of(_arrays(state)))

    def release(self) -> None:
        for keeper in self._keepers.values():
            keeper.release()

    # Counting. A device counts where only it knows whether a step was skipped.

    @property
    def counts_elsewhere(self) -> bool:
        return any(keeper.counts for keeper in self._keepers.values())

    def count(self) -> int:
        """Bring the state's step count up to date; the number of skipped steps."""
        total = 0
        for keeper in self._keepers.values():
            self.state["step"], skipped = keeper.count(self.state["step"])
            total += skipped
        return total

    def _stopped_counting(self) -> bool:
        """Let the host count again. False if it has counted all along."""
        if not self.counts_elsewhere:
            return False
        self.count()
        for keeper in self._keepers.values():
            keeper.stop_counting()
        return True

    def prepare_replay(self, settings: Declaration) -> bool:
        """For a captured step; False if there is none."""
        recipe, inputs = settings._scalars(checked_step(self.state))
        if not any(keeper.prepare_replay(recipe, inputs) for keeper in self._keepers.values()):
            return False
        self.state["step"] += 1
        return True

    # The state

    def copied(self, copy: Callable[[State], State] = copied_state) -> State:
        self.count()
        with self.apart("a state cannot be copied", self.state):
            return copy(self.state)

    def load(self, state: State, known: Signature | None) -> None:
        """Put a copy of a state in the place of the present one, if it fits."""
        with self.apart("a state cannot be loaded", state):
            state = copied_state(state)
        if self.state["slots"]:
            check_same(self.state["slots"], state["slots"])
        if self.known is not None and known is not None:
            check_same_parameters(self.known, known)
        self.known = known if self.known is None else self.known
        old, self.state, self._prepared = self.state, state, None
        for keeper in self._keepers.values():
            keeper.replace_state(old, state["step"])

    def take(self, state: State, known: Signature | None) -> None:
        """For a new optimizer: a state that was just copied on the current streams."""
        self.state, self.known = state, known
        for keeper, devices in self._keepers_of(_arrays(state)):
            keeper.end(devices)


@contextmanager
def _within(blocks: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """A block within all of these."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


def initial_slots(settings: Declaration, params: object) -> SlotArrays:
    """The slots of parameters before the first step."""
    leaves = resolve(pairs(params, ABSENT), writing=None)
    return fresh_slots(settings._slot_starts(), leaves)


def _keep_immutable(recipe: Recipe, leaves: list[Leaf], slots: SlotArrays) -> None:
    """Slots that could not be written to were replaced."""
    for leaf in leaves:
        if not leaf.mutable:
            for k, name in enumerate(recipe.slots):
                slots[name][leaf.key] = leaf.slots[k]


def _arrays(state: State) -> list[Array]:
    return [slot for arrays in state["slots"].values() for slot in arrays.values()]
