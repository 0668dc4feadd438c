"""The dtypes a parameter may be stored in, and those it is computed and remembered in.

To add one: a line here, and how it is stored and loaded in `codegen/llvm/elementwise` and `codegen/cuda/elementwise`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

RealName: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]
ComplexName: TypeAlias = Literal["complex64", "complex128"]
REAL_DTYPES: tuple[str, ...] = get_args(RealName)
COMPLEX_DTYPES: tuple[str, ...] = get_args(ComplexName)
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # of one number
PART = {"complex64": "float32", "complex128": "float64"}  # the dtype of a complex number's parts


def compute_dtype(dtype: str) -> str:
    """float32 for the 16-bit types, else the dtype's own real dtype."""
    return {"float16": "float32", "bfloat16": "float32"}.get(dtype, PART.get(dtype, dtype))


def slot_dtype(dtype: str) -> str:
    """The dtype of a parameter's slots: the compute dtype, or the complex dtype of a complex parameter."""
    return dtype if dtype in PART else compute_dtype(dtype)


def rounded(value: float, dtype: str) -> float:
    """A number as an array of the dtype would hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dtype(dtype).type(value))
