"""The CPU engine's threads: how many, and a small pool that helps the calling thread.

The caller always works too, and a helper that has not woken by the time the work is gone is
called off, so that a busy machine costs little. After a fork the child makes a pool of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# Held while anything is compiled, and across a fork, so that a child never begins in the middle of a compilation.
compiling = threading.RLock()

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_count: int | None = None


def _available() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _checked(n: object, source: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{source} is {n!r}: the number of threads is an int of at least 1")
    if n < 1:
        raise ValueError(f"{source} is {n}: the number of threads is at least 1")
    return n


def get_num_threads() -> int:
    """The number of threads that a step on the CPU may use.

    It is what `set_num_threads` set, else the environment variable ``XPOPTIM_NUM_THREADS``, else the
    number of CPUs this process may run on.

    >>> import xpoptim as xo
    >>> xo.get_num_threads() >= 1
    True
    """
    global _count
    if _count is None:
        text = os.environ.get("XPOPTIM_NUM_THREADS", "").strip()
        try:
            _count = _checked(int(text), "XPOPTIM_NUM_THREADS") if text else _available()
        except ValueError:
            raise ValueError(f"XPOPTIM_NUM_THREADS is {text!r}: set it to an integer of at least 1") from None
    return _count


def set_num_threads(n: int) -> None:
    """Bound the number of threads of the CPU engine. The results do not depend on it, to the last bit.

    Raises ``TypeError`` unless ``n`` is an int and ``ValueError`` if it is below 1.

    >>> import xpoptim as xo
    >>> before = xo.get_num_threads()
    >>> xo.set_num_threads(1)
    >>> xo.get_num_threads()
    1
    >>> xo.set_num_threads(before)
    """
    global _count
    _count = _checked(n, "n")
    _forget_pool()


def _forget_pool() -> None:
    global _pool
    with _lock:
        pool, _pool = _pool, None
    if pool is not None:
        pool.shutdown(wait=False)


def _after_fork() -> None:
    global _pool, _lock
    _lock, _pool = threading.Lock(), None  # the parent's threads do not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    os.register_at_fork(before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release)


def run(task: Callable[[], object], threads: int) -> None:
    """Call ``task`` in this thread and in up to ``threads - 1`` others at once; return when all calls have."""
    helpers = _submitted(task, threads - 1)
    try:
        task()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _submitted(task: Callable[[], object], count: int) -> list[Future[object]]:
    """The task, handed to helpers: to none where no thread can be started, as when the interpreter shuts down."""
    global _pool
    helpers: list[Future[object]] = []
    with _lock:
        try:
            if _pool is None:
                from concurrent.futures import ThreadPoolExecutor  # it takes milliseconds to import

                _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), thread_name_prefix="xpoptim")
            helpers.extend(_pool.submit(task) for _ in range(count))
        except RuntimeError:  # what was queued without a thread to take it goes with its pool
            pool, _pool = _pool, None
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
    return helpers
