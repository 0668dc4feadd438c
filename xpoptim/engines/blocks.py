"""A block program as a kernel over one array, by the engine of the array's library."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..arrays.namespaces.lookup import library_with
from ..arrays.types import Array, Strided
from ..trace.program import BlockProgram
from ..trace.scalars import evaluate
from .base import BlockKernel, KernelEngine
from .registry import kernels_for


def obstacle(x: Array, dtype: str) -> str:
    """Why no block kernel can serve an array, or an empty string."""
    library = library_with(x)
    engine = kernels_for(library)
    return engine.block_obstacle(x, dtype) if engine else f"there is no fused engine for {library.name} arrays"


def copy(to: Array, source: Array) -> None:
    """The values of an array into one of the same shape and dtype."""
    _engine_of(to).copy(to, source)


def _engine_of(x: Array) -> KernelEngine:
    engine = kernels_for(library_with(x))
    assert engine is not None
    return engine


class Kernel:
    """It is compiled for an engine when an array first asks for that."""

    def __init__(self, program: BlockProgram) -> None:
        self.program = program
        self._kernels: dict[str, BlockKernel] = {}

    def run(self, x: Strided, y: Strided, inputs: list[float], words: list[int]) -> None:
        """Fill ``y`` from ``x``, both in C order: in the same memory, or in two that do not overlap.

        On a GPU it has to be the current one, and the work is done on the current stream.
        """
        if not x.size:
            return
        numbers = x.size * (len(self.program.lanes) // 4)
        library = library_with(x)
        if library.name not in self._kernels:
            self._kernels.setdefault(library.name, _engine_of(x).block_kernel(self.program))
        self._kernels[library.name](
            x, y, numbers, _scalars(self.program, tuple(inputs)), np.array(words or [0], np.uint32)
        )


@lru_cache(maxsize=64)  # a layer asks for the same ones at each call
def _scalars(program: BlockProgram, inputs: tuple[float, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):
        scalars = np.array(evaluate(program, inputs) or [0.0]).astype(program.compute)
    scalars.flags.writeable = False
    return scalars
