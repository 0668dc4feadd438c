"""Jobs in threads of Python's, where there is no extension. Kernels run without the interpreter's lock.

Callers and helpers meet in a `queue.SimpleQueue` and in lists. Those are whole whenever a signal handler raises or a
finalizer steps another optimizer; the executors of `concurrent.futures` are not, and may then wait for ever.
"""

from __future__ import annotations

import operator
import os
from _thread import start_new_thread  # with the queue, so that gevent gives both or neither
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from ctypes import CFUNCTYPE, c_int64, c_void_p, memset
from functools import partial
from queue import SimpleQueue

from ..base import Made
from .threads import SHARE

# What Python says where it starts no thread: the system has none left, or the interpreter shuts down.
_REFUSALS = ("can't start new thread", "can't create new thread at interpreter shutdown")
_PROLOGUE = CFUNCTYPE(None, c_void_p, c_void_p)
_RUN = CFUNCTYPE(None, c_void_p, c_int64)

_waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()  # for a helper
_helpers: list[int] = []  # identifiers of their threads


def _after_fork() -> None:
    """The parent's threads do not exist in a child."""
    global _waiting, _helpers
    _waiting, _helpers = SimpleQueue(), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _serve(waiting: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        waiting.get()()


def _invite(help_out: Callable[[], None], helpers: int) -> None:
    try:
        while len(_helpers) < helpers:
            _helpers.append(start_new_thread(_serve, (_waiting,)))
    except RuntimeError as error:
        if str(error) not in _REFUSALS:
            raise  # a signal handler's
    for _ in range(min(helpers, len(_helpers))):
        _waiting.put(help_out)


class _Job:
    """A job with its scalars made and its cursors at their start. It is over when a worker comes back from it.

    To run it once more does nothing then: its workers take pieces by cursors.
    """

    def __init__(self, call: Sequence[int], helpers: int) -> None:
        prologue, inputs, scalars, run, at = call
        if prologue:
            _PROLOGUE(prologue)(inputs, scalars)
        head = (c_int64 * 2).from_address(at)
        head[1] = helpers + 1
        memset(head[0], 0, (helpers + 1) * SHARE)
        self._run: Callable[[int], None] = partial(_RUN(run), at)
        self.run_alone = partial(self._run, 0)
        self._open = True
        self._workers = list(range(helpers, 0, -1))  # not yet taken by a helper
        self._begun: list[int] = []  # as many as helpers: to append is one step, to count would not be
        self._ended: list[int] = []
        self._wake: SimpleQueue[int] = SimpleQueue()

    def run(self, helpers: int) -> None:
        try:
            _invite(self._help, helpers)
            self.run_alone()
        finally:
            try:
                self.close()
            except BaseException:  # a signal handler's, before or after it waits
                self.close()
                raise

    def _help(self) -> None:
        self._begun.append(1)  # before it looks whether the job is open
        if self._open:
            self._run(self._workers.pop())
        self._ended.append(1)
        self._wake.put(1)

    def close(self) -> None:
        """Call off what no helper has begun, and wait for what one has, however often a signal handler raises."""
        self._open, raised = False, None
        while len(self._ended) < len(self._begun):
            try:
                self._wake.get()
            except BaseException as error:
                raised = error
        if raised is not None:
            try:
                raise raised
            finally:
                raised = None  # else it would keep the frames of the step alive, this one among them


def perform(helpers: int, calls: Iterable[Sequence[int]], made: Made) -> None:
    """Run calls one after the other. ``made`` becomes 1 before the first."""
    jobs = [_Job(call, helpers) for call in calls]
    rest = map(operator.call, [job.run_alone for job in jobs])
    made.value = 1
    try:
        for job in jobs:
            job.run(helpers)
    except BaseException:  # a signal handler's: what was begun is brought to its end
        deque(rest, maxlen=0)  # in one call, so that no signal handler comes in between
        for job in jobs:
            job.close()
        raise
