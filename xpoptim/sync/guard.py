"""One caller at a time: another thread waits, a caller within the call raises, and a forked child starts free."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_forks = 0  # how many lie between this process and the first
_forkers: list[int] = []  # the thread that made each of them: the only one that the child goes on with


class Guard:
    """Who is inside, and the lock that keeps the others out.

    The lock is reentrant, so that a schedule or a signal handler that calls again meets an error and no deadlock.
    """

    __slots__ = ("forks", "lock", "owner")

    def __init__(self) -> None:
        self.forks, self.lock, self.owner = _forks, threading.RLock(), 0

    def renew(self) -> None:
        """In a forked child: the parent's other threads do not exist, and cannot open what they have locked."""
        with _renewing:
            if self.forks != _forks:
                # Not whether it is the thread that asks: a new thread may have the identifier of a lost one.
                if any(forker != self.owner for forker in _forkers[self.forks :]):
                    self.owner = 0
                self.lock = threading.RLock()
                self.forks = _forks

    def current(self) -> AbstractContextManager[bool]:
        """The lock in this process, for what waits for other threads but may be done within a call."""
        if self.forks != _forks:
            self.renew()
        return self.lock


class Guarded(Protocol):
    """What has a guard."""

    @property
    def _guard(self) -> Guard: ...


_Self = TypeVar("_Self", bound=Guarded)


def exclusive(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Let one caller of these methods of an object in at a time. A call from within another raises ``RuntimeError``."""
    name = method.__name__

    @functools.wraps(method)
    def guarded(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        guard = self._guard
        if guard.forks != _forks:
            guard.renew()
        # A signal handler may raise between any two calls. `with` on the lock itself leaves no gap, nor does the store.
        with guard.lock:
            if guard.owner:
                raise RuntimeError(
                    f"{type(self).__name__}.{name} is called while a step of the same optimizer is under way, from a "
                    "schedule, a rule or a signal handler: call it before or after the step"
                )
            try:
                guard.owner = threading.get_ident()
                return method(self, *args, **kwargs)
            finally:
                guard.owner = 0

    return guarded


def _after_fork() -> None:
    global _forks, _renewing
    _forkers.append(threading.get_ident())
    _forks += 1
    _renewing = threading.Lock()


_renewing = threading.Lock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
