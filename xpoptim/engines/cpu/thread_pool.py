"""Runs jobs by several threads: the caller and helpers, in the extension or, where there is none, in Python.

A job is a function ``run(job, worker)`` in machine code and its arguments, 64-bit fields in memory: the address of the
workers' cursors and the number of workers come first. The calling thread is worker 0 and always works too. What no
helper has begun when the caller is through is called off, so that a busy machine costs little.

To wake a sleeping thread takes tens of microseconds, as long as the step of a small model. So a helper of the
extension's stays awake for a while when the last job came soon after the one before: for some ten times what the job
itself takes, and 4 ms at most. It offers its CPU to any other thread all the while. In a program that computes for
longer than that between its steps, helpers sleep.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np

from ..base import Made
from . import python_pool
from .native import extension
from .threads import MOST, SHARE, available, get_num_threads

_CALL = 5  # fields of a call
# Elements for each worker, at least: with helpers that must be woken (about 50 µs), and with helpers that are awake.
_WORTH_WAKING, _WORTH_SHARING = 1 << 17, 1 << 15
_LONGEST = 4e-3  # seconds that a helper stays awake at most
_PER_ELEMENT = 5e-9  # seconds that it stays awake, for each element of the last job

_ended = 0.0  # when the last job was done


class Work:
    """A job of so many elements, as far as hiring goes: worked out once, since a step has no time for it."""

    def __init__(self, elements: int) -> None:
        awake = min(_LONGEST, elements * _PER_ELEMENT)
        self.soon = awake / 2  # so that a pause that is a little longer now and then does not find helpers asleep
        self.patience = int(awake * 1e9)
        self.most = max(0, min(MOST, elements // _WORTH_SHARING) - 1)
        self.most_to_wake = max(0, min(MOST, elements // _WORTH_WAKING) - 1)


def hired(work: Work) -> tuple[int, int]:
    """How many helpers may take part in a job, and the nanoseconds that they are to stay awake after it."""
    if work.most < 1:
        return 0, 0
    threads = get_num_threads()
    soon = time.perf_counter() - _ended < work.soon
    # More threads than CPUs would wait for each other, awake.
    patience = work.patience if soon and threads <= available() else 0
    return min(work.most if soon else work.most_to_wake, threads - 1), patience


def done() -> None:
    """To be called after a job."""
    global _ended
    _ended = time.perf_counter()


def cursors() -> np.ndarray:
    """Memory for the workers' cursors, with whose address a job begins."""
    return np.zeros(MOST * SHARE // 8, np.int64)


class Calls:
    """Jobs to be run one after the other, each with what makes its scalars before it; ``elements`` of the largest.

    A call is [prologue, inputs, scalars, run, job], addresses; no two may have the same cursors.
    """

    def __init__(self, calls: list[list[int]], elements: int) -> None:
        self.work, self.count, self._calls = Work(elements), len(calls), calls
        self._fields = np.array(calls, np.int64).reshape(len(calls), _CALL)
        self.at = self._fields.ctypes.data

    def run(self, made: Made) -> None:
        """Run them; return when they are done. ``made`` becomes 1 when they begin."""
        native = extension()
        if native is not None:
            native.perform(*hired(self.work), self.count, self.at, ctypes.addressof(made))
        else:
            helpers = min(self.work.most_to_wake, get_num_threads() - 1)  # they sleep
            python_pool.perform(helpers, self._calls, made)
        done()


def run(function: int, job: int, elements: int) -> None:
    """Run a single job, given by two addresses."""
    Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())
