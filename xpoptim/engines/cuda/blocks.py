"""Runs a block program over one CuPy array."""

from __future__ import annotations

import numpy as np

from ...arrays.types import CuPyArray
from ...codegen.cuda import blocks
from ...codegen.cuda.elementwise import THREADS
from ...trace.program import BlockProgram
from . import driver
from .plan import kernel


class BlockKernel:
    """The array's GPU has to be the current one. The work is done on the current stream."""

    def __init__(self, program: BlockProgram) -> None:
        self._program, self._source = program, blocks.source(program)

    def __call__(self, x: CuPyArray, y: CuPyArray, numbers: int, scalars: np.ndarray, words: np.ndarray) -> None:
        per_thread = len(self._program.lanes) * blocks.blocks_of_a_thread(self._program)
        grid = -(-numbers // (per_thread * THREADS))
        function = kernel(self._source, "blocks", x.device.id)
        # One structured element each, which a kernel gets by value.
        by_value = (scalars.view(blocks.scalars_dtype(self._program)), words.view(blocks.words_dtype(self._program)))
        driver.launch(function, grid, THREADS, (x, y, np.int64(numbers), *by_value))
