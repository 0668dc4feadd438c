"""Jobs in threads of Python's, where there is no extension. Kernels run without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CFUNCTYPE, c_int64, c_void_p, memset
from functools import cache
from threading import Semaphore

from ..base import Made
from .thread_pool import MOST, SHARE

# What Python says where it starts no thread: the system has none left, or the interpreter shuts down.
_REFUSALS = (
    "can't start new thread",
    "can't create new thread at interpreter shutdown",
    "cannot schedule new futures after interpreter shutdown",
)
_PROLOGUE = CFUNCTYPE(None, c_void_p, c_void_p)
_RUN = CFUNCTYPE(None, c_void_p, c_int64)


@cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, "xpoptim")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executor.cache_clear)  # the parent's threads do not exist in a child


class _Job:
    """A job with its scalars made and its cursors at their start. It is over when a worker comes back from it.

    To run it once more does nothing then: its workers take pieces from cursors.
    """

    def __init__(self, call: Sequence[int], helpers: int) -> None:
        prologue, inputs, scalars, run, self._at = call
        if prologue:
            _PROLOGUE(prologue)(inputs, scalars)
        head = (c_int64 * 2).from_address(self._at)
        head[1] = helpers + 1
        memset(head[0], 0, (helpers + 1) * SHARE)
        self._run: Callable[[int, int], None] = _RUN(run)
        self._open = True
        self._begun: list[int] = []
        self._ended: list[int] = []
        self._end = Semaphore(0)

    def run(self, helpers: int) -> None:
        try:
            _submit(self._help, range(1, helpers + 1))
            self._run(self._at, 0)
        finally:
            try:
                self._close()
            except BaseException:  # a signal handler's: helpers work in the caller's arrays, so once again
                self._close()
                raise

    def _help(self, worker: int) -> None:
        self._begun.append(worker)  # before it looks whether the job is open
        if self._open:
            self._run(self._at, worker)
        self._ended.append(worker)
        self._end.release()

    def _close(self) -> None:
        """Call off what no helper has begun, and wait for what one has."""
        self._open = False
        while len(self._ended) < len(self._begun):
            self._end.acquire()


def _submit(function: Callable[[int], None], workers: Iterable[int]) -> None:
    try:
        for worker in workers:
            _executor().submit(function, worker)
    except RuntimeError as error:
        if str(error) not in _REFUSALS:
            raise  # a signal handler's


def perform(helpers: int, calls: Iterable[Sequence[int]], made: Made) -> None:
    """Run calls one after the other. ``made`` becomes 1 before the first."""
    jobs = [_Job(call, helpers) for call in calls]
    made.value = 1
    try:
        for job in jobs:
            job.run(helpers)
    except BaseException:  # a signal handler's: what was begun is brought to its end
        for job in jobs:
            job.run(0)
        raise
