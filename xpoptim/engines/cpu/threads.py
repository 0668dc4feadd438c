"""How many threads the CPU engine may use, and the lock for what they must not do at the same time."""

from __future__ import annotations

import atexit
import os
import threading
from functools import cache

MOST = 64  # workers of a job: the bandwidth of the memory is spent long before
SHARE = 64  # bytes between the cursors of two workers: a cache line

# Held while anything is compiled; across a fork, so that a child never begins in the middle of a compilation; and from
# exit on, so that no daemon thread compiles while the process takes LLVM down, which would crash it.
compiling = threading.RLock()

_count: int | None = None


@cache
def available() -> int:
    """The number of CPUs that this process could run on when it was first asked."""
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
            _count = _checked(int(text), "XPOPTIM_NUM_THREADS") if text else available()
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


atexit.register(compiling.acquire)  # the main thread may still compile: the lock is its own
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release)
