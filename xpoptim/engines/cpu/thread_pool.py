"""Helper threads of the CPU engine, which live in machine code.

A job is a function ``run(job, worker)`` in machine code and its arguments, 64-bit fields in memory. The
calling thread is worker 0 and always works too. What no helper has begun when the caller is through is called
off, so that a busy machine costs little.

To wake a sleeping thread takes tens of microseconds, as long as the step of a small model. So a helper
stays awake for a while when the last job came soon after the one before: for some ten times what the job itself
takes, and 4 ms at most. It offers its CPU to any other thread all the while. In a program that computes for longer than
that between its steps, helpers sleep. On Linux a helper is woken on another CPU than its caller's: some kernels
would put it beside the caller, where it can only wait.

Helpers are claimed and released in machine code, where no signal handler or finalizer can come between; and their
code and memory are never given back, since a thread may be in them when the interpreter has gone.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...codegen.llvm.elementwise import load_fields
from .threads import available, compiling, get_num_threads

MOST = 64  # workers: the bandwidth of the memory is spent long before
SHARE = 64  # bytes between the cursors of two workers: a cache line
_CALL = 5  # fields of a call, for `perform`
# Elements for each worker, at least: with helpers that must be woken (about 50 µs), and with helpers that are awake.
_WORTH_WAKING, _WORTH_SHARING = 1 << 17, 1 << 15
_LONGEST = 4e-3  # seconds that a helper stays awake at most
_PER_ELEMENT = 5e-9  # seconds that it stays awake, for each element of the last job

# A helper's memory: the fields below; then its lock, its condition, and the CPUs it was last told to use, apart since
# CPUs fetch cache lines in pairs.
_LOCK, _CONDITION, _CPUS, _SIZE = 128, 256, 384, 512  # bytes
_STATE, _PATIENCE, _FUNCTION, _JOB, _WORKER, _THREAD, _OWNED = range(7)
_ASLEEP = 0  # states; 1: awake, 2: a job lies before it, 3: at work
_ABSENT, _FREE, _TAKEN = 0, 1, 2  # whether a caller may have it, or has it; memory that nobody has written is absent

# All helpers' memory, behind a header with the number of those to look at. It is never freed.
_memory = (ctypes.c_char * ((MOST + 1) * _SIZE))()
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_memory))
_HEADER = -(-ctypes.addressof(_memory) // _LOCK) * _LOCK
_FIRST = _HEADER + _LOCK
_look_at = ctypes.c_int64.from_address(_HEADER)

_CLOCK = getattr(time, "CLOCK_MONOTONIC", 1)  # its number differs between systems

_KEEP_OFF = f"""
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @sched_setaffinity(i32, i64, ptr)

; Has a helper that sleeps wake on another CPU than this one, of those that the caller may use, if there is one.
define internal void @keep_off(ptr %box) {{
entry:
  %mask = alloca [16 x i64], align 16
  %threadp = getelementptr i64, ptr %box, i64 {_THREAD}
  %thread = load i64, ptr %threadp
  %told = getelementptr i8, ptr %box, i64 {_CPUS}
  %cpu = call i32 @sched_getcpu()
  %here = sext i32 %cpu to i64
  %unknown = icmp eq i64 %thread, 0
  %far = icmp uge i64 %here, 1024
  %skip = or i1 %unknown, %far
  br i1 %skip, label %exit, label %ask
ask:
  %got = call i32 @sched_getaffinity(i32 0, i64 128, ptr %mask)
  %allowed = icmp eq i32 %got, 0
  br i1 %allowed, label %clear, label %exit
clear:
  %number = lshr i64 %here, 6
  %wordp = getelementptr i64, ptr %mask, i64 %number
  %word = load i64, ptr %wordp
  %place = and i64 %here, 63
  %bit = shl i64 1, %place
  %not = xor i64 %bit, -1
  %cleared = and i64 %word, %not
  store i64 %cleared, ptr %wordp
  br label %gather
gather:
  %k = phi i64 [ 0, %clear ], [ %knext, %gather ]
  %any = phi i64 [ 0, %clear ], [ %anynext, %gather ]
  %kp = getelementptr i64, ptr %mask, i64 %k
  %kw = load i64, ptr %kp
  %anynext = or i64 %any, %kw
  %knext = add i64 %k, 1
  %more = icmp slt i64 %knext, 16
  br i1 %more, label %gather, label %choose
choose:
  %none = icmp eq i64 %anynext, 0
  %chosen = select i1 %none, i64 %word, i64 %cleared
  store i64 %chosen, ptr %wordp
  br label %compare
compare: ; with what it was told the last time
  %c = phi i64 [ 0, %choose ], [ %cnext, %compare ]
  %changes = phi i64 [ 0, %choose ], [ %changed, %compare ]
  %wantp = getelementptr i64, ptr %mask, i64 %c
  %want = load i64, ptr %wantp
  %wasp = getelementptr i64, ptr %told, i64 %c
  %was = load i64, ptr %wasp
  %differs = xor i64 %want, %was
  %changed = or i64 %changes, %differs
  store i64 %want, ptr %wasp
  %cnext = add i64 %c, 1
  %cmore = icmp slt i64 %cnext, 16
  br i1 %cmore, label %compare, label %compared
compared:
  %unchanged = icmp eq i64 %changed, 0
  br i1 %unchanged, label %exit, label %move
move:
  %id = trunc i64 %thread to i32
  %moved = call i32 @sched_setaffinity(i32 %id, i64 128, ptr %mask)
  br label %exit
exit:
  ret void
}}
"""

_STAY = """
define internal void @keep_off(ptr %box) {
  ret void
}
"""

_CREW = f"""
declare i32 @sched_yield()
declare i32 @clock_gettime(i32, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)

; A helper's life.
define void @serve(ptr %box) {{
entry:
  %time = alloca [2 x i64], align 16
  %nanosecondsp = getelementptr i64, ptr %time, i64 1
  %patiencep = getelementptr i64, ptr %box, i64 {_PATIENCE}
  %functionp = getelementptr i64, ptr %box, i64 {_FUNCTION}
  %jobp = getelementptr i64, ptr %box, i64 {_JOB}
  %workerp = getelementptr i64, ptr %box, i64 {_WORKER}
  %lock = getelementptr i8, ptr %box, i64 {_LOCK}
  %condition = getelementptr i8, ptr %box, i64 {_CONDITION}
  br label %look
look: ; idle since: 0 is not known yet
  %since = phi i64 [ 0, %entry ], [ 0, %work ], [ %since, %take ], [ %begun, %wait ], [ 0, %woken ]
  %state = load atomic i64, ptr %box acquire, align 8
  %posted = icmp eq i64 %state, 2
  br i1 %posted, label %take, label %rest
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
  %told = call i32 @clock_gettime(i32 {_CLOCK}, ptr %time)
  %seconds = load i64, ptr %time
  %nanoseconds = load i64, ptr %nanosecondsp
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %nanoseconds
  %isnew = icmp eq i64 %since, 0
  %begun = select i1 %isnew, i64 %now, i64 %since
  %idle = sub i64 %now, %begun
  %patience = load atomic i64, ptr %patiencep monotonic, align 8
  %patient = icmp slt i64 %idle, %patience
  br i1 %patient, label %wait, label %leave
wait:
  %offered = call i32 @sched_yield()
  br label %look
leave:
  %leaving = cmpxchg ptr %box, i64 1, i64 0 acq_rel acquire
  %locked = call i32 @pthread_mutex_lock(ptr %lock)
  br label %sleep
sleep:
  %present = load atomic i64, ptr %box acquire, align 8
  %asleep = icmp eq i64 %present, 0
  br i1 %asleep, label %doze, label %woken
doze:
  %dozed = call i32 @pthread_cond_wait(ptr %condition, ptr %lock)
  br label %sleep
woken:
  %unlocked = call i32 @pthread_mutex_unlock(ptr %lock)
  br label %look
}}

; Lays the job before a helper, and wakes it if it sleeps.
define internal void @post(ptr %box) {{
entry:
  %handed = cmpxchg ptr %box, i64 1, i64 2 acq_rel acquire
  %done = extractvalue {{ i64, i1 }} %handed, 1
  br i1 %done, label %exit, label %wake
wake: ; it sleeps, or is about to and will look again once it holds the lock
  call void @keep_off(ptr %box)
  %lock = getelementptr i8, ptr %box, i64 {_LOCK}
  %condition = getelementptr i8, ptr %box, i64 {_CONDITION}
  %locked = call i32 @pthread_mutex_lock(ptr %lock)
  store atomic i64 2, ptr %box release, align 8
  %signalled = call i32 @pthread_cond_signal(ptr %condition)
  %unlocked = call i32 @pthread_mutex_unlock(ptr %lock)
  br label %exit
exit:
  ret void
}}

; Runs a job with at most so many helpers, of those that nobody else has. Its second word becomes the number of workers.
define internal void @together(i64 %most, i64 %patience, ptr %function, ptr %job) {{
entry:
  %ours = alloca [{MOST} x ptr], align 16
  %header = inttoptr i64 {_HEADER} to ptr
  %first = inttoptr i64 {_FIRST} to ptr
  %there = load atomic i64, ptr %header acquire, align 8
  br label %search
search:
  %s = phi i64 [ 0, %entry ], [ %snext, %seen ]
  %count = phi i64 [ 0, %entry ], [ %counted, %seen ]
  %left = icmp slt i64 %s, %there
  %wanting = icmp slt i64 %count, %most
  %on = and i1 %left, %wanting
  br i1 %on, label %try, label %found
try:
  %offset = mul i64 %s, {_SIZE}
  %candidate = getelementptr i8, ptr %first, i64 %offset
  %ownedp = getelementptr i64, ptr %candidate, i64 {_OWNED}
  %claim = cmpxchg ptr %ownedp, i64 {_FREE}, i64 {_TAKEN} acq_rel acquire
  %claimed = extractvalue {{ i64, i1 }} %claim, 1
  br i1 %claimed, label %keep, label %seen
keep:
  %keptp = getelementptr ptr, ptr %ours, i64 %count
  store ptr %candidate, ptr %keptp
  br label %seen
seen:
  %more = zext i1 %claimed to i64
  %counted = add i64 %count, %more
  %snext = add i64 %s, 1
  br label %search
found:
  %workers = add i64 %count, 1
  %workersp = getelementptr i64, ptr %job, i64 1
  store i64 %workers, ptr %workersp
  %shares = load ptr, ptr %job
  br label %clear
clear:
  %c = phi i64 [ 0, %found ], [ %cnext, %clear ]
  %shareat = mul i64 %c, {SHARE}
  %share = getelementptr i8, ptr %shares, i64 %shareat
  store i64 0, ptr %share
  %cnext = add i64 %c, 1
  %unclear = icmp slt i64 %cnext, %workers
  br i1 %unclear, label %clear, label %posting
posting:
  %i = phi i64 [ 0, %clear ], [ %inext, %postone ]
  %unposted = icmp slt i64 %i, %count
  br i1 %unposted, label %postone, label %own
postone:
  %boxp = getelementptr ptr, ptr %ours, i64 %i
  %box = load ptr, ptr %boxp
  %inext = add i64 %i, 1
  %patiencep = getelementptr i64, ptr %box, i64 {_PATIENCE}
  store atomic i64 %patience, ptr %patiencep monotonic, align 8
  %functionp = getelementptr i64, ptr %box, i64 {_FUNCTION}
  store ptr %function, ptr %functionp
  %jobp = getelementptr i64, ptr %box, i64 {_JOB}
  store ptr %job, ptr %jobp
  %workerp = getelementptr i64, ptr %box, i64 {_WORKER}
  store i64 %inext, ptr %workerp
  call void @post(ptr %box)
  br label %posting
own:
  call void %function(ptr %job, i64 0)
  br label %recall
recall:
  %k = phi i64 [ 0, %own ], [ %knext, %release ]
  %unrecalled = icmp slt i64 %k, %count
  br i1 %unrecalled, label %recallone, label %exit
recallone:
  %kboxp = getelementptr ptr, ptr %ours, i64 %k
  %kbox = load ptr, ptr %kboxp
  %knext = add i64 %k, 1
  %withdrawn = cmpxchg ptr %kbox, i64 2, i64 1 acq_rel acquire
  br label %poll
poll:
  %n = phi i64 [ 0, %recallone ], [ %nnext, %busy ], [ %nnext, %offer ]
  %kstate = load atomic i64, ptr %kbox acquire, align 8
  %works = icmp eq i64 %kstate, 3
  br i1 %works, label %busy, label %release
busy:
  %nnext = add i64 %n, 1
  %long = icmp sgt i64 %n, 1000
  br i1 %long, label %offer, label %poll
offer:
  %offered = call i32 @sched_yield()
  br label %poll
release:
  %kownedp = getelementptr i64, ptr %kbox, i64 {_OWNED}
  store atomic i64 {_FREE}, ptr %kownedp release, align 8
  br label %recall
exit:
  ret void
}}

; Runs one job after the other, with nothing of Python's between them. calls: [prologue, inputs, scalars, function, job]
; for each, where the prologue, if there is one, makes the scalars of the inputs. `made` becomes 1 before the first.
define void @perform(i64 %most, i64 %patience, i64 %count, ptr %calls, ptr %made) {{
entry:
  store i64 1, ptr %made
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %inext, %run ]
  %left = icmp slt i64 %i, %count
  br i1 %left, label %one, label %exit
one:
  %offset = mul i64 %i, {_CALL * 8}
  %call = getelementptr i8, ptr %calls, i64 %offset
{load_fields("call", "ptr prologue", "ptr inputs", "ptr scalars", "ptr function", "ptr job")}
  %without = icmp eq ptr %prologue, null
  br i1 %without, label %run, label %scalar
scalar:
  call void %prologue(ptr %inputs, ptr %scalars)
  br label %run
run:
  call void @together(i64 %most, i64 %patience, ptr %function, ptr %job)
  %inext = add i64 %i, 1
  br label %next
exit:
  ret void
}}
"""


def _assembly(platform: str) -> str:
    """The whole module, for a platform as `sys.platform` names it. Only on Linux may a thread choose its CPUs."""
    return (_KEEP_OFF if platform == "linux" else _STAY) + _CREW


@cache
def _process() -> ctypes.PyDLL:
    return ctypes.PyDLL(None)


@cache
def _compiled() -> Any:
    from .jit import Module

    module = Module(_assembly(sys.platform), vectorize=False, library=_process())
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))  # helpers never leave it
    return module


def _address(name: str) -> int:
    with compiling:
        return int(_compiled().address(name))


@cache
def perform_at() -> int:
    """The address of ``perform(most, patience, count, calls, made)``, for machine code that calls it."""
    return _address("perform")


@cache
def _functions() -> tuple[Callable[[int], None], Callable[[int, int, int, int, int], None]]:
    """``serve`` and ``perform``; ctypes lets go of the interpreter's lock while they run."""
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    serve = ctypes.CFUNCTYPE(None, pointer)(_address("serve"))
    return serve, ctypes.CFUNCTYPE(None, word, word, word, pointer, pointer)(perform_at())


_PLACES = range(MOST - 2, -1, -1)  # in a helper's memory; the last is taken first
_places = list(_PLACES)  # for helpers that there are not yet
_helpers: list[int] = []  # the places of those that there are
# What Python says where it starts no thread: the system has none left, or the interpreter shuts down (from 3.12 on).
_REFUSALS = ("can't start new thread", "can't create new thread at interpreter shutdown")
_ended = 0.0  # when the last job was done


def _after_fork() -> None:
    """The parent's threads do not exist in a child."""
    global _places, _helpers
    ctypes.memset(_HEADER, 0, (MOST - 1) * _SIZE + _LOCK)
    _places, _helpers = list(_PLACES), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _live(serve: Callable[[int], None]) -> None:
    """A helper's thread. It settles by itself: a signal handler may raise anywhere in the main thread, but not here."""
    try:
        place = _places.pop()
    except IndexError:
        return
    at = _FIRST + place * _SIZE
    memory = (ctypes.c_int64 * 7).from_address(at)  # zeros: asleep as far as others can tell, and absent
    memory[_THREAD] = threading.get_native_id()
    _process().pthread_mutex_init(ctypes.c_void_p(at + _LOCK), None)
    _process().pthread_cond_init(ctypes.c_void_p(at + _CONDITION), None)
    memory[_OWNED] = _FREE
    _helpers.append(place)
    while _look_at.value <= max(_helpers):  # others may be settling, too
        _look_at.value = max(_helpers) + 1
    serve(at)


def _make() -> bool:
    """One more helper; False if there is none soon, as where no thread can be started."""
    serve, count = _functions()[0], len(_helpers)
    if not _places:
        return False
    try:
        _thread.start_new_thread(_live, (serve,))
    except RuntimeError as error:
        if str(error) not in _REFUSALS:
            raise  # a signal handler's
        return False
    end = time.monotonic() + 0.1
    while len(_helpers) == count and time.monotonic() < end:
        time.sleep(1e-5)
    return len(_helpers) > count


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
    most = min(work.most if soon else work.most_to_wake, threads - 1)
    while len(_helpers) < most and _make():
        pass
    # More threads than CPUs would wait for each other, awake.
    return most, work.patience if soon and threads <= available() else 0


def done() -> None:
    """To be called after a job."""
    global _ended
    _ended = time.perf_counter()


def cursors() -> np.ndarray:
    """Memory for the workers' cursors, with whose address a job begins."""
    return np.zeros(MOST * SHARE // 8, np.int64)


class Calls:
    """Jobs to be run one after the other, each with what makes its scalars before it; ``elements`` of the largest."""

    def __init__(self, calls: list[list[int]], elements: int) -> None:
        self.work, self.count = Work(elements), len(calls)
        self._fields = np.array(calls, np.int64).reshape(len(calls), _CALL)
        self.at = self._fields.ctypes.data

    def run(self, made: ctypes.c_int64) -> None:
        """Run them; return when they are done. ``made``, a ``c_int64``, becomes 1 when they begin."""
        _functions()[1](*hired(self.work), self.count, self.at, ctypes.addressof(made))
        done()


def run(function: int, job: int, elements: int) -> None:
    """Run a single job, given by two addresses."""
    Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())
