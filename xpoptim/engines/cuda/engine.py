"""The CUDA engine: which CuPy arrays its kernels can work on, and what it makes of the others."""

from __future__ import annotations

from dataclasses import replace

from ...arrays.dtypes import PART
from ...arrays.leaves import Leaf
from ...arrays.memory import dense_alike
from ...arrays.types import CuPyArray
from ...recipe.recipe import Traced
from ...trace.program import BlockProgram
from .. import base
from . import driver
from .blocks import BlockKernel
from .keeper import Keeper
from .plan import Plan


class _CUDA:
    def keeper(self) -> Keeper:
        return Keeper()

    def plan(
        self, traced: Traced, leaves: list[Leaf], keeper: base.Keeper | None, *, capturable: bool, alone: bool
    ) -> Plan:
        assert keeper is None or isinstance(keeper, Keeper)
        return Plan(traced, leaves, keeper, capturable=capturable, alone=alone)

    def obstacle(self, leaf: Leaf[CuPyArray]) -> str:
        arrays = [leaf.p, *([leaf.g] if leaf.g is not None else []), *leaf.slots]
        if leaf.g is not None and leaf.dtype in PART and leaf.g_dtype not in PART:
            return f"its gradient is real ({leaf.g_dtype}) and it is complex"
        return "" if dense_alike(arrays) else "its arrays are not dense, or differ in layout"

    def remark(self) -> str:
        return ""

    def stageable(self, leaf: Leaf[CuPyArray]) -> bool:
        return True  # CuPy's own arithmetic would flush subnormals

    def staged(self, leaf: Leaf[CuPyArray]) -> Leaf[CuPyArray]:
        dtype = leaf.g_dtype
        if leaf.dtype in PART and dtype not in PART:
            dtype = "complex128" if dtype == "float64" else "complex64"  # exact: kernels round, CuPy flushes subnormals
        g = driver.dense(leaf.g if dtype == leaf.g_dtype else driver.converted(leaf.g, dtype))
        slots = [driver.dense(slot) for slot in leaf.slots]
        return replace(leaf, p=driver.dense(leaf.p), g=g, g_dtype=dtype, slots=slots)

    def copy(self, to: CuPyArray, source: CuPyArray) -> None:
        driver.copy(to, source)

    def block_obstacle(self, x: CuPyArray, dtype: str) -> str:
        return ""

    def block_kernel(self, program: BlockProgram) -> BlockKernel:
        return BlockKernel(program)


ENGINE: base.KernelEngine[CuPyArray] = _CUDA()
