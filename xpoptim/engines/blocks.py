"""Runs a block program over one array: on the CPU by LLVM and threads, on a GPU by CUDA."""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from ..fusion import cuda_blocks, llvm_blocks
from ..fusion.cuda import THREADS
from ..fusion.program import BlockProgram
from ..fusion.scalars import evaluate
from . import threads

_WORTH_THREADS = 1 << 18  # numbers; below, waking a second thread costs more than it gains
_GRAIN = 1 << 13  # blocks of a task

_lock = threading.Lock()


def obstacle(x: Any, dtype: str) -> str:
    """Why the kernels cannot serve an array, or an empty string."""
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            return "its bytes are not in the machine's order"
        if dtype == "float16":
            from .jit import half_precision

            return "" if half_precision() else "this CPU has no instructions for float16"
    return ""


def run(program: BlockProgram, x: Any, y: Any, inputs: list[float], words: list[int]) -> None:
    """Fill ``y`` from ``x``, both in C order; the same array, or two that do not overlap."""
    if not x.size:
        return
    real = np.float32 if program.compute == "float32" else np.float64
    with np.errstate(over="ignore"):
        scalars = np.array(evaluate(program, inputs) or [0.0]).astype(real)
    numbers = x.size * (len(program.lanes) // 4)
    on_host = isinstance(x, np.ndarray)
    (_run_on_cpu if on_host else _run_on_gpu)(program, x, y, numbers, scalars, np.array(words, np.uint32))


@lru_cache(maxsize=64)
def _cpu_kernel(program: BlockProgram, in_place: bool) -> tuple[Any, Any]:
    from .jit import Module

    module = Module(llvm_blocks.assembly(program, in_place=in_place))
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    run = ctypes.CFUNCTYPE(None, pointer, pointer, word, pointer, pointer, pointer, word)
    return run(module.address("run")), module


def _run_on_cpu(
    program: BlockProgram, x: np.ndarray, y: np.ndarray, numbers: int, scalars: np.ndarray, words: np.ndarray
) -> None:
    with _lock:  # so that two threads do not compile the same
        kernel, _ = _cpu_kernel(program, x is y)
    cursor = np.zeros(1, np.int64)
    count = threads.get_num_threads() if numbers >= _WORTH_THREADS else 1
    grain = _GRAIN if count > 1 else numbers
    at = [a.ctypes.data for a in (x, y, scalars, words, cursor)]
    arguments = (at[0], at[1], numbers, at[2], at[3], at[4], grain)
    if count == 1:
        kernel(*arguments)
    else:
        tasks = -(-numbers // (len(program.lanes) * grain))
        threads.run(lambda: kernel(*arguments), min(count, tasks))


def _run_on_gpu(program: BlockProgram, x: Any, y: Any, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
    from . import cuda, driver

    device = x.device.id
    per_thread = len(program.lanes) * cuda_blocks.blocks_of_a_thread(program)
    grid = -(-numbers // (per_thread * THREADS))
    values = (_by_value(scalars), _by_value(words))
    with driver.on(device):
        function = cuda.kernel(_source(program), "blocks", device)
        driver.launch(function, grid, THREADS, (x, y, np.int64(numbers), *values))


_source = lru_cache(maxsize=64)(cuda_blocks.source)


def _by_value(values: np.ndarray) -> np.ndarray:
    """The values as one structured element, which a kernel gets by value."""
    return values.view(np.dtype([("at", values.dtype, (values.size,))])).reshape(1)
