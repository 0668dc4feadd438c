"""Runs a block program over one NumPy array, by LLVM and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...codegen.llvm import blocks
from ...trace.program import BlockProgram
from . import thread_pool
from .threads import compiling

if TYPE_CHECKING:
    from .jit import Module

_GRAIN = 1 << 13  # blocks of a task


class BlockKernel:
    """It is compiled when it first runs."""

    def __init__(self, program: BlockProgram) -> None:
        self._program = program
        self._modules: dict[bool, tuple[int, Module]] = {}

    def __call__(self, x: np.ndarray, y: np.ndarray, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
        cursors = thread_pool.cursors()
        source, target, *rest = (a.ctypes.data for a in (x, y, scalars, words))
        job = np.array([cursors.ctypes.data, 0, source, target, numbers, *rest, _GRAIN], np.int64)
        thread_pool.run(self._compiled(source == target), job.ctypes.data, numbers)

    def _compiled(self, in_place: bool) -> int:
        if in_place not in self._modules:
            with compiling:  # so that two threads do not compile the same, nor a fork comes between
                if in_place not in self._modules:
                    from .jit import Module

                    assembly = blocks.assembly(self._program, in_place=in_place)
                    module = Module(assembly, subnormals=("prologue", "run"))
                    self._modules[in_place] = module.address("run"), module  # the module holds the code
        return self._modules[in_place][0]
