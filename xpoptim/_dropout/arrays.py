"""Applies a mask and a scale to one array of any namespace, layout and dtype: the arrays' side of Dropout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..arrays.dtypes import COMPLEX_DTYPES, REAL_DTYPES, compute_dtype
from ..arrays.memory import extent, overlap, overlaps_itself
from ..arrays.namespaces.libraries import Library
from ..arrays.namespaces.lookup import dtype_name, library_of
from ..arrays.types import Array, Device, Index, Namespace, Strided
from ..engines import blocks
from ..engines.choose import selected

# Elements that the reference handles at once, so that temporaries stay in the cache whatever the size of x. On a GPU
# each operation is a launch, which larger pieces repay.
PIECE = 1 << 16
PIECE_ON_GPU = 1 << 24

# where(keep, x * scale, zero); a keep of None stands for a mask of ones.
Definition = Callable[[Namespace, Array, Array | None, Array, Array], Array]


class Operand(NamedTuple):
    """One array to work on, checked, and where its result goes."""

    library: Library
    xp: Namespace
    x: Any  # an array of that library
    out: Any  # None: a new array
    device: Device
    dtype: str
    is_scalar: bool
    takes_kernel: bool  # else the reference

    def result(self, y: Array) -> Any:
        return y[()] if self.is_scalar and self.out is None else y


def checked(name: str, x: Any, out: Any) -> Operand:
    is_scalar = isinstance(x, (bool, int, float, complex, np.generic))
    x = np.asarray(x) if is_scalar else x
    library = library_of(x)
    if library is None:
        raise TypeError(f"{name} must be an array or a scalar, not {type(x).__name__}")
    x = library.without_subclass(x)
    dtype = dtype_name(x)
    if dtype not in REAL_DTYPES + COMPLEX_DTYPES:
        raise TypeError(
            f"{name} has dtype {dtype}, but Dropout takes {', '.join(REAL_DTYPES + COMPLEX_DTYPES)}: "
            "convert it first, for example to float32"
        )
    if out is not None:
        _check_out(name, x, out, library)
    takes_kernel = _takes_kernel(name, x, dtype)
    return Operand(library, library.namespace(x), x, out, library.placement(x), dtype, is_scalar, takes_kernel)


def _check_out(name: str, x: Array, out: Array, library: Library) -> None:
    other = library_of(out)
    if isinstance(out, np.generic) or other is None:
        raise TypeError(f"out must be a mutable array, not {type(out).__name__}")
    for one in (library, other):
        if not one.mutable:
            raise TypeError(
                f"out must be a mutable array, but {one.title} arrays are immutable: use the value that is returned"
            )
    if other is not library:
        raise TypeError(f"out is of {other.name} but {name} is of {library.name}")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype} but {name} has dtype {x.dtype}: they must be equal")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out has shape {tuple(out.shape)} but {name} has shape {tuple(x.shape)}: they must be equal")
    here, there = library.device(out), library.device(x)
    if here != there:
        raise ValueError(f"out is on {here} but {name} is on {there}: they must be on one device")
    if not library.writable(out):
        raise ValueError("out is read-only: give an array that can be written, or none")
    if overlaps_itself(out):
        raise ValueError("out has elements that share their memory (as after broadcasting): give a copy")


# --- The reference --------------------------------------------------------------------------------------


def by_reference(operand: Operand, keep: Array | None, scale: float, definition: Definition) -> Array:
    """The definition carried out on a whole array, real or complex, piece by piece; a keep of None keeps all."""
    xp, x, out = operand.xp, operand.x, operand.out
    factor = xp.asarray(scale, dtype=getattr(xp, compute_dtype(operand.dtype)), device=operand.device)
    keep = None if keep is None else xp.broadcast_to(keep, x.shape)
    if not operand.library.mutable:
        return _immutable(operand, keep, factor, definition)
    if out is None:
        out = xp.empty_like(x)
    elif out is not x and not _apart(x, out):
        x = xp.asarray(x, copy=True)
    most = PIECE_ON_GPU if operand.library.launches(operand.device) else PIECE
    with np.errstate(all="ignore"):  # inf * 0 and overflow have the results of IEEE 754, without a warning
        for source, target in zip(_real_parts(xp, x), _real_parts(xp, out), strict=True):
            for piece in _pieces(tuple(x.shape), most):
                kept = None if keep is None else keep[piece]
                target[piece] = _part(xp, source[piece], kept, factor, definition)
    return out


def _immutable(operand: Operand, keep: Array | None, factor: Array, definition: Definition) -> Array:
    parts = [_part(operand.xp, part, keep, factor, definition) for part in _real_parts(operand.xp, operand.x)]
    return parts[0] if len(parts) == 1 else operand.library.joined(*parts)


def _part(xp: Namespace, x: Array, keep: Array | None, factor: Array, definition: Definition) -> Array:
    """The definition on a real array, computed in the factor's dtype and rounded to its own."""
    wide = xp.astype(x, factor.dtype, copy=False)
    return xp.astype(definition(xp, wide, keep, factor, xp.zeros_like(factor)), x.dtype, copy=False)


def _real_parts(xp: Namespace, x: Array) -> list[Array]:
    """``x`` itself, or views of its two real parts: a complex product would spread an inf over both."""
    return [xp.real(x), xp.imag(x)] if dtype_name(x).startswith("complex") else [x]


def _pieces(shape: tuple[int, ...], most: int) -> Iterator[Index]:
    """Indexes that cut an array of any layout, along one axis, into parts of at most about so many elements."""
    axis = 0
    while axis < len(shape) and math.prod(shape[axis + 1 :]) > most:
        axis += 1
    if axis == len(shape):
        yield (...,)
        return
    step = max(1, most // max(1, math.prod(shape[axis + 1 :])))
    for lead in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            yield (*lead, slice(start, min(start + step, shape[axis])), ...)


# --- The kernels ----------------------------------------------------------------------------------------


def _takes_kernel(name: str, x: Array, dtype: str) -> bool:
    """Whether the engine in force means a kernel for this array."""
    engine = selected()
    if engine == "reference":
        return False
    reason = blocks.obstacle(x, dtype)
    if engine == "fused" and reason:
        raise ValueError(f'{name} cannot take the fused path: {reason} (xo.engine("auto") allows it)')
    return not reason


def by_kernel(operand: Operand, kernel: blocks.Kernel, scale: float, words: list[int]) -> Array:
    """The kernel over a whole array; what does not lie in C order goes through a copy that does."""
    xp, x, out = operand.xp, operand.x, operand.out
    if x.flags.c_contiguous and (out is None or _one_pass(x, out)):
        y: Any = xp.empty_like(x) if out is None else out
        kernel.run(x, y, [scale], words)
        return y
    y = xp.empty(x.shape, dtype=x.dtype)
    blocks.copy(y, x)
    kernel.run(y, y, [scale], words)
    if out is None:
        return y
    blocks.copy(out, y)
    return out


# --- Memory ---------------------------------------------------------------------------------------------


def _one_pass(x: Strided, out: Strided) -> bool:
    """Whether a kernel can write ``out`` while it reads ``x``, which lies in C order."""
    a, b = extent(x), extent(out)
    in_place = a is not None and b is not None and a.ctypes.data == b.ctypes.data
    return out.flags.c_contiguous and (in_place or _apart(x, out))


def _apart(x: Array, out: Array) -> bool:
    """Whether two arrays surely share no memory."""
    a, b = extent(x), extent(out)
    return a is not None and b is not None and not overlap(a, b)
