"""What an optimizer keeps on GPUs: the order of the work there, the count of the steps, and captured steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from ...arrays.namespaces.libraries import CUPY
from ...arrays.namespaces.lookup import library_of
from ...codegen.cuda import elementwise as text
from ...recipe.recipe import Recipe
from . import driver
from .turns import Turns

MOST_INPUTS = 61


class Counter:
    """The step count of an optimizer, kept on the device because only the device knows whether a step was skipped.

    ``state`` holds the applied steps, the skipped ones, whether to skip the present one, and the inputs that
    replays of a captured step read. ``expected`` is the number of steps that the host believes were applied.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.expected = -1  # none yet
        with driver.on(device):
            self.state = driver.zeros(text.INPUTS + MOST_INPUTS, np.float64)

    def expect(self, step: int) -> None:
        """Go on counting from ``step``, which is another number only if a user wrote it to the state."""
        if self.expected != step:
            driver.upload(self.state[text.STEP : text.STEP + 1], np.array([float(step)]))
            self.expected = step


class Captured(Protocol):
    """A plan whose step was captured."""

    recipe: Recipe

    @property
    def devices(self) -> Sequence[int]: ...

    def set_replay(self, inputs: Sequence[float]) -> None:
        """Hand the inputs to the replays to come, in stream order."""


class Keeper(Turns):
    """For one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self._counter: Counter | None = None
        self._plan: Captured | None = None  # which a captured graph runs
        self._kept: list[object] = []  # plans and states whose memory captured graphs use, replayed or not

    @property
    def counts(self) -> bool:
        return self._counter is not None

    def counter_on(self, device: int) -> Counter:
        if self._counter is None or self._counter.device != device:
            self._counter = Counter(device)
        return self._counter

    def devices_of(self, arrays: Iterable[Any]) -> set[int]:
        return {array.data.device_id for array in arrays if library_of(array) is CUPY}

    def count(self, step: int) -> tuple[int, int]:
        if self._counter is None or self._counter.expected < 0:
            return step, 0
        written = step != self._counter.expected  # by the user: the GPU is told at the next step
        words = self.read("the step count cannot be read", self._counter.state)
        self._counter.expected = int(words[text.STEP])
        return (step if written else self._counter.expected), int(words[text.SKIPPED])

    def stop_counting(self) -> None:
        self._counter = None

    def capture(self, plan: Captured) -> None:
        """A step of a plan is being captured."""
        self.captured = True
        self._plan = plan
        self._kept.append(plan)

    def prepare_replay(self, recipe: Recipe, inputs: Sequence[float]) -> bool:
        plan = self._plan
        if plan is None or self._counter is None:
            return False
        if plan.recipe != recipe:
            raise RuntimeError("prepare_replay: an option was switched on or off since the capture: capture again")
        self.refuse("a replay cannot be prepared", plan.devices)
        with self.taken(plan.devices):
            plan.set_replay(inputs)
        self._counter.expected += 1
        return True

    def replace_state(self, old: object, step: int) -> None:
        if self._plan is not None:
            self._kept.append(old)
            self._plan = None
        self.release()
        if self._counter is not None:
            with self.taken([self._counter.device]):
                self._counter.expected = -1  # the GPU may have skipped some: it is told in any case
                self._counter.expect(step)

    def refuse_capture(self, devices: Iterable[int]) -> None:
        if any(map(driver.capturing, devices)):
            raise capture_refused()


def capture_refused() -> RuntimeError:
    """A step that must check, compile or allocate cannot be captured in a CUDA graph."""
    return RuntimeError(
        "update cannot be captured now: make the optimizer with capturable=True, and run update once on the "
        "same arrays (and with the same options) before the capture"
    )
