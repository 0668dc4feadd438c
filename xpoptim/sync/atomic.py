"""A value that several threads and signal handlers change, each change whole and none lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Atomic(Generic[T]):
    """One immutable value, changed by compare-and-swap.

    There is no lock. So none can be found taken by a signal handler that comes in the middle of a change and makes one
    of its own, or by the child of a fork.

    >>> count = Atomic(1)
    >>> count.change(lambda n: n + 1)
    2
    >>> count.get()
    2
    """

    def __init__(self, value: T) -> None:
        self._link = _Link(value)

    def get(self) -> T:
        return self._last().value

    def change(self, function: Callable[[T], T]) -> T:
        """Put ``function(value)`` in the value's place and return it.

        The function is called again if another change came between; it must have no effects. What it raises is raised,
        and nothing has changed.
        """
        while True:
            last = self._last()
            new = _Link(function(last.value))
            # The swap. `setdefault` is atomic: of several threads here, one hangs its own link on the last.
            if last.next.setdefault("next", new) is new:
                self._link = new
                return new.value

    def _last(self) -> _Link[T]:
        # The chain is followed to its end, since a thread may set `_link` late, after others have gone on.
        link = self._link
        while link.next:
            link = link.next["next"]
        return link


class _Link(Generic[T]):
    """A value, and the link with the value that took its place, if one did."""

    __slots__ = ("next", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.next: dict[str, _Link[T]] = {}
