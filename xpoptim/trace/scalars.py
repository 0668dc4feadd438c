"""The scalar program, carried out on the host: float64 and the table's own operations, so the same bits as anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ops import TABLE
from .program import Program


def evaluate(program: Program, inputs: Sequence[float]) -> list[float]:
    """The scalar block of a program, each entry in float64; the kernel's dtype rounds it once. A bool is 1.0 or 0.0."""
    known: dict[int, np.float64 | np.bool_] = {}
    with np.errstate(all="ignore"):
        for number, node in program.scalar_steps:
            if node.op == "input":
                known[number] = np.float64(inputs[program.inputs.index(str(node.value))])
            elif node.op == "const":
                known[number] = np.bool_(node.value) if isinstance(node.value, bool) else np.float64(node.value)
            else:
                known[number] = TABLE[node.op].array(np, *(known[i] for i in node.args))[()]
    return [float(known[number]) for number in program.scalars]
