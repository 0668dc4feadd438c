"""The device: its stream, its memory, and whether it still answers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .machine import no_torch, one_line
from .record import Row

T = TypeVar("T")
LOST = 3  # exit status


class Lost(SystemExit):
    """Ends the process: after an error like an access beyond memory, CUDA answers nothing more in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(LOST)
        self.reason = reason


@contextlib.contextmanager
def one_stream() -> Iterator[Any]:
    """One stream for CuPy and torch."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if not no_torch():
            import torch

            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)))
        yield stream
        stream.synchronize()


def free_memory() -> None:
    """Give back what nothing holds any more."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if not no_torch():
        import torch

        torch.cuda.empty_cache()


def attempt(row: Row, work: Callable[[], T]) -> T | None:
    """What ``work`` returns. If it raises, that costs its own row, and what it held is given back."""
    try:
        return work()
    except Exception as error:
        row.error = one_line(error)
    recover()
    return None


def recover() -> None:
    """Go on after an error, or raise `Lost` where that cannot be done."""
    import cupy

    try:
        cupy.cuda.runtime.deviceSynchronize()
        free_memory()
    except Exception as error:
        raise Lost(one_line(error)) from None
