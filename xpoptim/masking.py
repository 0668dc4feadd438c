"""Applies a mask and a scale to one array of any namespace, layout and dtype: the arrays' side of Dropout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .engines.selection import selected
from .fusion.dtypes import COMPLEX_DTYPES, REAL_DTYPES, compute_dtype
from .fusion.program import BlockProgram
from .leaves import dtype_name

# Elements that the reference handles at once, so that temporaries stay in the cache whatever the size of x.
PIECE = 1 << 16

# where(keep, x * scale, zero); a keep of None stands for a mask of ones.
Definition = Callable[[Any, Any, Any, Any, Any], Any]


class Operand(NamedTuple):
    """One array to work on, checked, and where its result goes."""

    xp: Any
    x: Any
    out: Any  # None: a new array
    device: Any
    dtype: str
    is_scalar: bool

    def result(self, y: Any) -> Any:
        return y[()] if self.is_scalar and self.out is None else y


def operand(name: str, x: Any, out: Any) -> Operand:
    from array_api_compat import array_namespace, device, is_array_api_obj, is_jax_namespace, is_numpy_array

    is_scalar = isinstance(x, (bool, int, float, complex, np.generic))
    if not is_scalar and not is_array_api_obj(x):
        raise TypeError(f"{name} must be an array or a scalar, not {type(x).__name__}")
    if is_scalar or is_numpy_array(x):
        x = np.asarray(x)
    xp = array_namespace(x)
    dtype = dtype_name(x)
    if dtype not in REAL_DTYPES + COMPLEX_DTYPES:
        raise TypeError(
            f"{name} has dtype {dtype}, but Dropout takes {', '.join(REAL_DTYPES + COMPLEX_DTYPES)}: "
            "convert it first, for example to float32"
        )
    if out is not None:
        _check_out(name, x, out, xp)
    # JAX chooses the device of what it is given itself, and under jit a device has no meaning.
    where = None if is_jax_namespace(xp) else device(x)
    return Operand(xp, x, out, where, dtype, is_scalar)


def _check_out(name: str, x: Any, out: Any, xp: Any) -> None:
    from array_api_compat import array_namespace, device, is_array_api_obj, is_jax_namespace

    if isinstance(out, np.generic) or not is_array_api_obj(out):
        raise TypeError(f"out must be a mutable array, not {type(out).__name__}")
    if is_jax_namespace(xp) or is_jax_namespace(array_namespace(out)):
        raise TypeError("out must be a mutable array, but JAX arrays are immutable: use the value that is returned")
    if array_namespace(out) is not xp:
        raise TypeError(f"out is of {array_namespace(out).__name__} but {name} is of {xp.__name__}")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype} but {name} has dtype {x.dtype}: they must be equal")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out has shape {tuple(out.shape)} but {name} has shape {tuple(x.shape)}: they must be equal")
    if device(out) != device(x):
        raise ValueError(f"out is on {device(out)} but {name} is on {device(x)}: they must be on one device")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only: give an array that can be written, or none")
    if _overlaps_itself(out):
        raise ValueError("out has elements that share their memory (as after broadcasting): give a copy")


def reference(leaf: Operand, keep: Any, scale: float, definition: Definition) -> Any:
    """The definition carried out on a whole array, real or complex, piece by piece; a keep of None keeps all."""
    from array_api_compat import is_jax_namespace

    xp, x, out = leaf.xp, leaf.x, leaf.out
    factor = leaf.xp.asarray(scale, dtype=getattr(xp, compute_dtype(leaf.dtype)), device=leaf.device)
    if is_jax_namespace(xp):
        return _immutable(leaf, keep, factor, definition)
    if out is None:
        out = xp.empty_like(x)
    elif out is not x and _may_overlap(xp, x, out):
        x = xp.asarray(x, copy=True)
    with np.errstate(all="ignore"):  # inf * 0 and overflow have the results of IEEE 754, without a warning
        for source, target in zip(_real_parts(xp, x), _real_parts(xp, out), strict=True):
            for piece in _pieces(tuple(x.shape)):
                kept = None if keep is None else keep[piece]
                target[piece] = _part(xp, source[piece], kept, factor, definition)
    return out


def _immutable(leaf: Operand, keep: Any, factor: Any, definition: Definition) -> Any:
    import jax

    parts = [_part(leaf.xp, part, keep, factor, definition) for part in _real_parts(leaf.xp, leaf.x)]
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def _part(xp: Any, x: Any, keep: Any, factor: Any, definition: Definition) -> Any:
    """The definition on a real array, computed in the factor's dtype and rounded to its own."""
    wide = xp.astype(x, factor.dtype, copy=False)
    return xp.astype(definition(xp, wide, keep, factor, xp.zeros_like(factor)), x.dtype, copy=False)


def obstacle(leaf: Operand) -> str:
    """Why no kernel can serve an array, or an empty string."""
    from array_api_compat import is_cupy_namespace, is_numpy_namespace

    if not is_numpy_namespace(leaf.xp) and not is_cupy_namespace(leaf.xp):
        return f"there is no fused engine for {leaf.xp.__name__}"
    from .engines import blocks

    return blocks.obstacle(leaf.x, leaf.dtype)


def fused(leaf: Operand, program: BlockProgram, scale: float, words: list[int]) -> Any:
    """The kernel over a whole array; what does not lie in C order goes through a copy that does."""
    from .engines import blocks

    x, out = leaf.x, leaf.out
    if isinstance(x, np.ndarray):
        x = x.view(np.ndarray)
    dense = x.flags.c_contiguous
    if out is None:
        y = leaf.xp.empty_like(x) if dense else x.copy(order="C")
        blocks.run(program, x if dense else y, y, [scale], words)
        return y
    target = out.view(np.ndarray) if isinstance(out, np.ndarray) else out
    if dense and out is leaf.x:
        blocks.run(program, x, x, [scale], words)
    elif dense and target.flags.c_contiguous and not _may_overlap(leaf.xp, x, target):
        blocks.run(program, x, target, [scale], words)
    else:
        y = x.copy(order="C")
        blocks.run(program, y, y, [scale], words)
        target[...] = y
    return out


def wants_kernel(leaf: Operand, reason: str) -> bool:
    """Whether the engine in force means a kernel; ``reason`` is what speaks against one."""
    engine = selected()
    reason = reason or obstacle(leaf)
    if engine == "fused" and reason:
        raise ValueError(f'this array cannot take the fused path of Dropout: {reason} (xo.engine("auto") allows it)')
    return engine != "reference" and not reason


def _real_parts(xp: Any, x: Any) -> list[Any]:
    """``x`` itself, or views of its two real parts: a complex product would spread an inf over both."""
    return [xp.real(x), xp.imag(x)] if dtype_name(x).startswith("complex") else [x]


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indexes that cut an array of any layout, along one axis, into parts of at most about PIECE elements."""
    axis = 0
    while axis < len(shape) and math.prod(shape[axis + 1 :]) > PIECE:
        axis += 1
    if axis == len(shape):
        yield (...,)
        return
    step = max(1, PIECE // max(1, math.prod(shape[axis + 1 :])))
    for lead in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            yield (*lead, slice(start, min(start + step, shape[axis])), ...)


def _may_overlap(xp: Any, a: Any, b: Any) -> bool:
    """False only if ``a`` and ``b`` surely share no memory."""
    from array_api_compat import is_cupy_namespace, is_numpy_namespace, is_torch_namespace

    if is_numpy_namespace(xp) or is_cupy_namespace(xp):
        return bool(xp.may_share_memory(a, b))
    if is_torch_namespace(xp):
        (a_start, a_size), (b_start, b_size) = (
            (s.data_ptr(), s.nbytes()) for s in (a.untyped_storage(), b.untyped_storage())
        )
        return bool(a_start < b_start + b_size and b_start < a_start + a_size)
    return True  # no portable way to ask: the copy is always right


def _overlaps_itself(x: Any) -> bool:
    """True unless the strides nest, as those of every slice, transpose or reshape of an ordinary array do."""
    if hasattr(x, "stride"):  # torch counts strides in elements
        strides, reach = x.stride(), 1
    else:
        strides, reach = getattr(x, "strides", None), getattr(x, "itemsize", 1)
    if strides is None or 0 in x.shape:
        return False
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False
