"""Runs a block program over one array: on the CPU by LLVM and threads, on a GPU by CUDA."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ..codegen.cuda import blocks as cuda_blocks
from ..codegen.cuda.elementwise import THREADS
from ..codegen.llvm import blocks as llvm_blocks
from ..trace.program import BlockProgram
from ..trace.scalars import evaluate
from .cpu import thread_pool
from .cpu.threads import compiling

_GRAIN = 1 << 13  # blocks of a task


def obstacle(x: Any, dtype: str) -> str:
    """Why the kernels cannot serve an array, or an empty string."""
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            return "its bytes are not in the machine's order"
        if dtype == "float16":
            from .cpu.jit import half_precision

            return "" if half_precision() else "this CPU has no instructions for float16"
    return ""


def copy(to: Any, source: Any) -> None:
    """The values of an array into one of the same shape and dtype."""
    if isinstance(source, np.ndarray):
        to[...] = source
    else:
        from .cuda import driver

        driver.copy(to, source)


class Kernel:
    """A block program that runs on NumPy and CuPy arrays. It is compiled when an array first asks for it."""

    def __init__(self, program: BlockProgram) -> None:
        self.program = program
        self._on_cpu: dict[bool, tuple[int, Any]] = {}

    def run(self, x: Any, y: Any, inputs: list[float], words: list[int]) -> None:
        """Fill ``y`` from ``x``, both in C order: in the same memory, or in two that do not overlap.

        On a GPU it has to be the current one, and the work is done on the current stream.
        """
        if not x.size:
            return
        numbers = x.size * (len(self.program.lanes) // 4)
        real = np.float32 if self.program.compute == "float32" else np.float64
        with np.errstate(over="ignore"):
            scalars = np.array(evaluate(self.program, inputs) or [0.0]).astype(real)
        run = self._run_on_cpu if isinstance(x, np.ndarray) else self._run_on_gpu
        run(x, y, numbers, scalars, np.array(words or [0], np.uint32))

    def _compiled(self, in_place: bool) -> int:
        if in_place not in self._on_cpu:
            with compiling:  # so that two threads do not compile the same, nor a fork comes between
                if in_place not in self._on_cpu:
                    from .cpu.jit import Module

                    module = Module(
                        llvm_blocks.assembly(self.program, in_place=in_place), subnormals=("prologue", "run")
                    )
                    self._on_cpu[in_place] = module.address("run"), module  # the module holds the code
        return self._on_cpu[in_place][0]

    def _run_on_cpu(self, x: np.ndarray, y: np.ndarray, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
        cursors = thread_pool.cursors()
        source, target, *rest = (a.ctypes.data for a in (x, y, scalars, words))
        job = np.array([cursors.ctypes.data, 0, source, target, numbers, *rest, _GRAIN], np.int64)
        thread_pool.run(self._compiled(source == target), job.ctypes.data, numbers)

    @cached_property
    def _cuda(self) -> str:
        return cuda_blocks.source(self.program)

    def _run_on_gpu(self, x: Any, y: Any, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
        from .cuda import driver, plan

        per_thread = len(self.program.lanes) * cuda_blocks.blocks_of_a_thread(self.program)
        grid = -(-numbers // (per_thread * THREADS))
        function = plan.kernel(self._cuda, "blocks", x.device.id)
        # One structured element each, which a kernel gets by value.
        by_value = (
            scalars.view(cuda_blocks.scalars_dtype(self.program)),
            words.view(cuda_blocks.words_dtype(self.program)),
        )
        driver.launch(function, grid, THREADS, (x, y, np.int64(numbers), *by_value))
