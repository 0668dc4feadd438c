"""The CPU engine: which NumPy arrays its kernels can work on, and what it makes of the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...arrays.dtypes import PART
from ...arrays.leaves import Leaf
from ...arrays.memory import dense_alike
from ...recipe.recipe import Traced
from ...trace.program import BlockProgram
from ..base import Keeper, KernelEngine
from .blocks import BlockKernel
from .native import WITHOUT, missing
from .plan import Plan

_NO_FLOAT16 = "this CPU has no instructions for float16"


class _CPU:
    def keeper(self) -> None:
        return None

    def plan(self, traced: Traced, leaves: list[Leaf], keeper: Keeper | None, *, capturable: bool, alone: bool) -> Plan:
        return Plan(traced, leaves)

    def obstacle(self, leaf: Leaf[np.ndarray]) -> str:
        arrays = [leaf.p, *([leaf.g] if leaf.g is not None else []), *leaf.slots]
        if any(not a.dtype.isnative for a in arrays):
            return "its bytes are not in the machine's order"
        if leaf.g is not None and leaf.dtype in PART and leaf.g_dtype not in PART:
            return f"its gradient is real ({leaf.g_dtype}) and it is complex"
        if not self.stageable(leaf):
            return _NO_FLOAT16
        if not dense_alike(arrays):
            if not dense_alike([leaf.p]):
                return f"the parameter is not dense (shape {leaf.p.shape}, strides {leaf.p.strides})"
            return "gradient and parameter differ in layout: strides " + " and ".join(
                str(a.strides) for a in (leaf.g, leaf.p) if a is not None
            )
        return ""

    def remark(self) -> str:
        return WITHOUT if missing() else ""

    def stageable(self, leaf: Leaf[np.ndarray]) -> bool:
        return "float16" not in (leaf.dtype, leaf.g_dtype) or _half_precision()

    def staged(self, leaf: Leaf[np.ndarray]) -> Leaf[np.ndarray]:
        arrays = [leaf.library.kernels_write(a) for a in (leaf.p, *leaf.slots)]
        if not dense_alike(arrays):
            arrays = [np.asarray(a, order="C") for a in arrays]
        copy = replace(leaf, p=arrays[0], slots=arrays[1:])
        dtype = leaf.g.dtype.newbyteorder("=")
        if leaf.dtype in PART and leaf.g_dtype not in PART:
            dtype = np.result_type(dtype, np.complex64)
            copy.g_dtype = dtype.name
        copy.g = np.empty_like(copy.p, dtype=dtype)
        copy.g[...] = leaf.g
        return copy

    def copy(self, to: np.ndarray, source: np.ndarray) -> None:
        to[...] = source

    def block_obstacle(self, x: np.ndarray, dtype: str) -> str:
        if not x.dtype.isnative:
            return "its bytes are not in the machine's order"
        return _NO_FLOAT16 if dtype == "float16" and not _half_precision() else ""

    def block_kernel(self, program: BlockProgram) -> BlockKernel:
        return BlockKernel(program)


def _half_precision() -> bool:
    from .jit import half_precision

    return half_precision()


ENGINE: KernelEngine[np.ndarray] = _CPU()
