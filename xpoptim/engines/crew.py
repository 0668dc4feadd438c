"""Helper threads of the CPU engine, which live in machine code.

A job is a function ``run(job, worker)`` in machine code and its arguments, 64-bit words in memory. The
calling thread is worker 0 and always works too. What no helper has begun when the caller is through is called
off, so that a busy machine costs little.

To wake a sleeping thread takes tens of microseconds, as long as the step of a small model. So a helper
stays awake for a while when the last job came soon after the one before: for some ten times what the job itself
takes, and 4 ms at most. It offers its CPU to any other thread all the while. In a program that computes for longer than
that between its steps, helpers sleep. Where the system allows it, a helper is woken on another CPU than its
caller's: some kernels would put it beside the caller, where it can only wait.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import threading
import time
from functools import cache
from typing import Any

import numpy as np

from .threads import compiling, get_num_threads

MOST = 64  # workers: the bandwidth of the memory is spent long before
SHARE = 64  # bytes between the cursors of two workers: a cache line
# Elements for each worker, at least: with helpers that must be woken (about 50 µs), and with helpers that are awake.
_WORTH_WAKING, _WORTH_SHARING = 1 << 17, 1 << 15
_LONGEST = 4e-3  # seconds that a helper stays awake at most
_PER_ELEMENT = 5e-9  # seconds that it stays awake, for each element of the last job
_YIELD = 2.5e-7  # seconds that offering the CPU takes, at least

# A helper's memory: state, patience, function, job, worker, 64-bit words; then its lock and its condition.
# States: 0 asleep (or about to be), 1 awake, 2 a job lies before it, 3 at work, 4 dismissed for good.
_LOCK, _CONDITION, _SIZE = 128, 256, 384  # bytes; twice a cache line apart, since CPUs fetch them in pairs
_ASLEEP, _GONE = 0, 4

_ASSEMBLY = f"""
declare i32 @sched_yield()
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)

; A helper's life.
define void @serve(ptr %box) {{
entry:
  %patiencep = getelementptr i64, ptr %box, i64 1
  %functionp = getelementptr i64, ptr %box, i64 2
  %jobp = getelementptr i64, ptr %box, i64 3
  %workerp = getelementptr i64, ptr %box, i64 4
  %lock = getelementptr i8, ptr %box, i64 {_LOCK}
  %condition = getelementptr i8, ptr %box, i64 {_CONDITION}
  br label %look
look:
  %idle = phi i64 [ 0, %entry ], [ 0, %work ], [ %idle, %take ], [ %longer, %wait ], [ 0, %woken ]
  %state = load atomic i64, ptr %box acquire, align 8
  switch i64 %state, label %rest [ i64 2, label %take
                                   i64 4, label %exit ]
take:
  %claim = cmpxchg ptr %box, i64 2, i64 3 acq_rel acquire
  %claimed = extractvalue {{ i64, i1 }} %claim, 1
  br i1 %claimed, label %work, label %look
work:
  %function = load ptr, ptr %functionp
  %job = load ptr, ptr %jobp
  %worker = load i64, ptr %workerp
  call void %function(ptr %job, i64 %worker)
  store atomic i64 1, ptr %box release, align 8
  br label %look
rest:
  %patience = load atomic i64, ptr %patiencep monotonic, align 8
  %longer = add i64 %idle, 1
  %tired = icmp sgt i64 %longer, %patience
  br i1 %tired, label %leave, label %wait
wait:
  %offered = call i32 @sched_yield()
  br label %look
leave:
  %leaving = cmpxchg ptr %box, i64 1, i64 0 acq_rel acquire
  %locked = call i32 @pthread_mutex_lock(ptr %lock)
  br label %sleep
sleep:
  %now = load atomic i64, ptr %box acquire, align 8
  %asleep = icmp eq i64 %now, 0
  br i1 %asleep, label %doze, label %woken
doze:
  %dozed = call i32 @pthread_cond_wait(ptr %condition, ptr %lock)
  br label %sleep
woken:
  %unlocked = call i32 @pthread_mutex_unlock(ptr %lock)
  br label %look
exit:
  ret void
}}

; Takes a helper from state `from` to state `to`, waking it if it sleeps.
define void @tell(ptr %box, i64 %to) {{
entry:
  %told = cmpxchg ptr %box, i64 1, i64 %to acq_rel acquire
  %done = extractvalue {{ i64, i1 }} %told, 1
  br i1 %done, label %exit, label %wake
wake: ; it sleeps, or is about to and will look again once it holds the lock
  %lock = getelementptr i8, ptr %box, i64 {_LOCK}
  %condition = getelementptr i8, ptr %box, i64 {_CONDITION}
  %locked = call i32 @pthread_mutex_lock(ptr %lock)
  store atomic i64 %to, ptr %box release, align 8
  %signalled = call i32 @pthread_cond_signal(ptr %condition)
  %unlocked = call i32 @pthread_mutex_unlock(ptr %lock)
  br label %exit
exit:
  ret void
}}

; Runs a job with `count` helpers, whose memory `boxes` lists, and sets its second word, the number of workers.
define void @together(ptr %boxes, i64 %count, i64 %patience, ptr %function, ptr %job) {{
entry:
  %workers = add i64 %count, 1
  %workersp = getelementptr i64, ptr %job, i64 1
  store i64 %workers, ptr %workersp
  %shares = load ptr, ptr %job
  br label %clear
clear:
  %c = phi i64 [ 0, %entry ], [ %cnext, %clear ]
  %offset = mul i64 %c, {SHARE}
  %share = getelementptr i8, ptr %shares, i64 %offset
  store i64 0, ptr %share
  %cnext = add i64 %c, 1
  %unclear = icmp slt i64 %cnext, %workers
  br i1 %unclear, label %clear, label %post
post:
  %i = phi i64 [ 0, %clear ], [ %inext, %postone ]
  %unposted = icmp slt i64 %i, %count
  br i1 %unposted, label %postone, label %own
postone:
  %boxp = getelementptr ptr, ptr %boxes, i64 %i
  %box = load ptr, ptr %boxp
  %inext = add i64 %i, 1
  %patiencep = getelementptr i64, ptr %box, i64 1
  store atomic i64 %patience, ptr %patiencep monotonic, align 8
  %functionp = getelementptr i64, ptr %box, i64 2
  store ptr %function, ptr %functionp
  %jobp = getelementptr i64, ptr %box, i64 3
  store ptr %job, ptr %jobp
  %workerp = getelementptr i64, ptr %box, i64 4
  store i64 %inext, ptr %workerp
  call void @tell(ptr %box, i64 2)
  br label %post
own:
  call void %function(ptr %job, i64 0)
  br label %recall
recall:
  %k = phi i64 [ 0, %own ], [ %knext, %poll ]
  %unrecalled = icmp slt i64 %k, %count
  br i1 %unrecalled, label %recallone, label %exit
recallone:
  %kboxp = getelementptr ptr, ptr %boxes, i64 %k
  %kbox = load ptr, ptr %kboxp
  %knext = add i64 %k, 1
  %withdrawn = cmpxchg ptr %kbox, i64 2, i64 1 acq_rel acquire
  br label %poll
poll:
  %n = phi i64 [ 0, %recallone ], [ %nnext, %busy ], [ %nnext, %offer ]
  %kstate = load atomic i64, ptr %kbox acquire, align 8
  %works = icmp eq i64 %kstate, 3
  br i1 %works, label %busy, label %recall
busy:
  %nnext = add i64 %n, 1
  %long = icmp sgt i64 %n, 1000
  br i1 %long, label %offer, label %poll
offer:
  %offered = call i32 @sched_yield()
  br label %poll
exit:
  ret void
}}
"""


@cache
def _process() -> ctypes.PyDLL:
    """The functions of the C library. None of those used here takes long: the interpreter's lock is held."""
    return ctypes.PyDLL(None)


@cache
def _compiled() -> Any:
    import llvmlite.binding as llvm

    from .jit import Module

    for name in re.findall(r"^declare .* @(\w+)", _ASSEMBLY, re.MULTILINE):
        llvm.add_symbol(name, ctypes.cast(getattr(_process(), name), ctypes.c_void_p).value)
    return Module(_ASSEMBLY, vectorize=False)


def _address(name: str) -> int:
    with compiling:
        return int(_compiled().address(name))


@cache
def _function(name: str, *arguments: Any) -> Any:
    """A compiled function; ctypes lets go of the interpreter's lock while it runs."""
    return ctypes.CFUNCTYPE(None, *arguments)(_address(name))


@cache
def together() -> int:
    """The address of ``together(boxes, count, patience, function, job)``, for machine code that calls it."""
    return _address("together")


class Helper:
    """A thread that serves whoever took it off the list of idle ones. ``RuntimeError``: none can be started."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * (_SIZE + _LOCK))()
        self.at = -(-ctypes.addressof(self._memory) // _LOCK) * _LOCK
        self.alone = (ctypes.c_int64 * 1)(self.at)  # what `boxes` gives for this helper
        self._state = ctypes.c_int64.from_address(self.at)
        _process().pthread_mutex_init(ctypes.c_void_p(self.at + _LOCK), None)
        _process().pthread_cond_init(ctypes.c_void_p(self.at + _CONDITION), None)
        self._cpus = _cpus()
        self._kept_off = -1
        serve = _function("serve", ctypes.c_void_p)
        self._thread = threading.Thread(target=serve, args=(self.at,), name="xpoptim", daemon=True)
        self._thread.start()

    def keep_off(self) -> None:
        """If it sleeps, have it wake on another CPU than the caller's."""
        if self._cpus and self._state.value == _ASLEEP:
            here = _process().sched_getcpu()
            others = self._cpus - {here}
            if here != self._kept_off and others:
                self._move_to(others)
                self._kept_off = here

    def _move_to(self, cpus: frozenset[int]) -> None:
        try:
            os.sched_setaffinity(self._thread.native_id or 0, cpus)
        except OSError:  # the process may no longer use them: leave it to the system from now on
            self._cpus = frozenset()

    def close(self) -> None:
        """End the thread."""
        _function("tell", ctypes.c_void_p, ctypes.c_int64)(self.at, _GONE)
        self._thread.join()


def _cpus() -> frozenset[int]:
    """The CPUs among which helpers may be moved; none where that cannot be done."""
    possible = hasattr(os, "sched_setaffinity") and hasattr(_process(), "sched_getcpu")
    return frozenset(os.sched_getaffinity(0)) if possible else frozenset()


_lock = threading.Lock()
_idle: list[Helper] = []
_number = 0  # of helpers, idle or not
_ended = 0.0  # when the last job was done


def _after_fork() -> None:
    global _lock, _idle, _number
    _lock, _idle, _number = threading.Lock(), [], 0  # the parent's threads do not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _close() -> None:
    """End the helpers before the interpreter lets go of their code. One at work is in a step that has not returned."""
    while _idle:
        _idle.pop().close()


class Work:
    """A job of so many elements, as far as hiring goes: worked out once, since a step has no time for it."""

    def __init__(self, elements: int) -> None:
        awake = min(_LONGEST, elements * _PER_ELEMENT)
        self.soon = awake / 2  # so that a pause that is a little longer now and then does not find helpers asleep
        self.patience = int(awake / _YIELD)
        self.most = min(MOST, elements // _WORTH_SHARING) - 1
        self.most_to_wake = min(MOST, elements // _WORTH_WAKING) - 1


def hired(work: Work) -> tuple[list[Helper], int]:
    """Helpers for a job, to be given to `dismiss` after it, and the patience they are to have."""
    if work.most < 1:
        return [], 0
    soon = time.perf_counter() - _ended < work.soon
    count = min(work.most if soon else work.most_to_wake, get_num_threads() - 1)
    helpers: list[Helper] = []
    while len(helpers) < count and (helper := _taken()) is not None:
        helpers.append(helper)
    return helpers, work.patience if soon else 0


def _taken() -> Helper | None:
    """An idle helper or a new one. None if there are as many as there may be, or no thread can be started."""
    global _number
    try:
        helper = _idle.pop()
    except IndexError:
        with _lock:
            if _number >= get_num_threads() - 1:
                return None
            try:
                helper = Helper()
            except RuntimeError:  # as when the interpreter shuts down
                return None
            _number += 1
    helper.keep_off()
    return helper


def dismiss(helpers: list[Helper]) -> None:
    """Give helpers back after a job."""
    global _ended
    _idle.extend(helpers)
    _ended = time.perf_counter()


def cursors() -> np.ndarray:
    """Memory for the workers' cursors, with whose address a job begins."""
    return np.zeros(MOST * SHARE // 8, np.int64)


def boxes(helpers: list[Helper]) -> Any:
    """Where the helpers' memory lies, as ``together`` wants it."""
    return helpers[0].alone if len(helpers) == 1 else (ctypes.c_int64 * len(helpers))(*[x.at for x in helpers])


def run(function: int, job: int, work: Work) -> None:
    """Run a job, given by two addresses; return when it is done."""
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    call = _function("together", pointer, word, word, pointer, pointer)
    helpers, patience = hired(work)
    try:
        call(boxes(helpers), len(helpers), patience, function, job)
    finally:
        dismiss(helpers)
