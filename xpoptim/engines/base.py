"""What an engine is: the interface that `reference`, `cpu` and `cuda` implement."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import c_int64
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from ..arrays.leaves import Leaf
from ..arrays.types import Array
from ..recipe.recipe import Recipe, Traced
from ..trace.program import BlockProgram

# Parameters, gradients, then each slot: one entry a leaf, in the leaves' order. What stands there may be no array.
Columns: TypeAlias = list[list[Any]]
Made: TypeAlias = c_int64  # becomes 1 with the step, for a caller that is interrupted before it is told
_A = TypeVar("_A", bound=Array, contravariant=True)


class Watch(Protocol):
    """Knows the arrays of a plan as they were, to tell whether they still are."""

    def unchanged(self, columns: Columns) -> bool:
        """Whether places, shapes, strides and dtypes are what they were.

        Gradients may have moved to where nothing is written: the plan reads them there from now on.
        """


class Direct(Protocol):
    """A watch and the only pass of a plan in one call, over containers that need no walk."""

    def run(self, inputs: list[float], containers: tuple[object, ...], made: Made) -> bool:
        """Run the pass unless anything may have changed. Returns whether it was run."""


class Plan(Protocol):
    """The passes of a recipe over some leaves. It may hold addresses only: who runs it keeps the arrays alive."""

    devices: Sequence[int] = ()  # those whose current streams it uses
    # Whether a pass finds the sums of the pass before where the engine keeps them. Then the host neither reads them nor
    # waits, and a device counts the steps.
    keeps_sums: bool = False

    def set_inputs(self, inputs: Sequence[float]) -> None:
        """The scalars of the next passes, in the recipe's order, as far as the host knows them."""

    def run(self, kind: str, made: Made) -> None:
        """Run a pass, ``"norm"`` or ``"update"``, over every leaf.

        An update sets ``made`` before its first write, unless it is recorded into a graph and made later.
        """

    def sums(self) -> Mapping[str, float]:
        """What the pass before summed up, by the leaves' keys. Waits for it."""

    def watch(self, columns: Columns, keys: list[list[object]], copied: Iterable[int]) -> Watch | None:
        """A watch over the arrays as they are; None if they must be checked in full before each step.

        ``keys`` are the arrays' keys in their containers. ``copied`` are the leaves of whose gradient the plan reads a
        copy.
        """
        return None

    def direct(self, watch: Watch, container: type) -> Direct | None:
        """The watch and the pass in one call, for a flat container of this type, or an array. None: not possible."""
        return None


class Keeper(Protocol):
    """What an engine keeps of an optimizer on its devices: the order of the work there, and what is counted there."""

    @property
    def counts(self) -> bool:
        """Whether a device counts the steps."""

    def devices_of(self, arrays: Iterable[Array]) -> set[int]:
        """Of those arrays that are this engine's."""

    def begin(self, devices: Collection[int]) -> Sequence[int]:
        """Begin a turn: what the current streams do from now on waits for all that was done before, on any stream.

        Returns the devices on which to `end` it. A device whose current stream is captured into a graph is left out,
        since what is captured is not done now.
        """

    def apart(self, what: str, devices: Iterable[int]) -> AbstractContextManager[None]:
        """A turn that is no step, on these devices and all that were used so far.

        Raises ``RuntimeError`` during a capture; ``what`` says what cannot be done then.
        """

    def taken(self, devices: Collection[int]) -> AbstractContextManager[None]:
        """A block that is a turn."""

    def end(self, devices: Iterable[int]) -> None:
        """End a turn: the next one waits for what the current streams have been given by now."""

    def release(self) -> None:
        """Let the memory of the last steps be used again once these are done."""

    def refuse_capture(self, devices: Iterable[int]) -> None:
        """An error if a current stream is being captured: a step that checks, compiles or allocates cannot be."""

    def count(self, step: int) -> tuple[int, int]:
        """Applied and skipped steps. ``step`` is what the host believes, or what a user has written to the state."""

    def stop_counting(self) -> None:
        """The host counts from now on."""

    def prepare_replay(self, recipe: Recipe, inputs: Sequence[float]) -> bool:
        """Hand inputs to a captured step. False if there is none."""

    def replace_state(self, old: object, step: int) -> None:
        """Another state took the old one's place. A captured step is void, but the memory that it writes is kept."""


class Engine(Protocol):
    """Carries out recipes."""

    def keeper(self) -> Keeper | None:
        """For an optimizer; None if there is nothing to keep."""
        return None

    def plan(self, traced: Traced, leaves: list[Leaf], keeper: Keeper | None, *, capturable: bool, alone: bool) -> Plan:
        """Compile and lay out. ``alone``: no other plan takes part in the step. Without a keeper nothing is kept."""


class BlockKernel(Protocol[_A]):
    def __call__(self, x: _A, y: _A, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
        """Fill ``y`` from ``x``, both in C order: in the same memory, or in two that do not overlap."""


class KernelEngine(Engine, Protocol[_A]):
    """Has kernels for the arrays of one library. It is `ENGINE` in the module ``engine`` of its folder."""

    def obstacle(self, leaf: Leaf) -> str:
        """Why no kernel can work on a leaf's arrays as they are, or an empty string."""

    def remark(self) -> str:
        """What users should know of how kernels run here, or an empty string."""

    def stageable(self, leaf: Leaf) -> bool:
        """Whether a kernel can work on dense copies of them."""

    def staged(self, leaf: Leaf) -> Leaf:
        """The leaf with dense copies in the place of what no kernel can work on."""

    def copy(self, to: _A, source: _A) -> None:
        """The values of an array into one of the same shape and dtype."""

    def block_obstacle(self, x: _A, dtype: str) -> str:
        """Why no block kernel can serve an array, or an empty string."""

    def block_kernel(self, program: BlockProgram) -> BlockKernel:
        """A block program as a kernel, compiled when it first runs."""
