"""Random words from a counter: the same on every backend, with no state to carry.

Philox4x32-10 turns a 128-bit counter and a 64-bit key into four 32-bit words. Word ``i`` of a stream depends
on ``(seed, stream, i)`` alone, so any part of it can be drawn again later, elsewhere, and in any order: this
is what lets :class:`xpoptim.Dropout` keep no mask, and what makes its masks equal on NumPy, CuPy, torch and
JAX.

    key     = (seed low, seed high)
    counter = (block low, block high, stream low, stream high)
    word i  = output word i % 4 of block i // 4

Streams whose top bit is clear belong to dropout (``layer << 32 | call``); those whose top bit is set are reserved.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from .arrays.namespaces.lookup import library_behind, standard
from .arrays.types import Array, Device, Namespace
from .sync.atomic import Atomic

__all__ = ["seed", "words"]

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# Blocks drawn at once: 128 KiB a lane, so that the dozen lanes alive in a round stay in a core's own cache.
# On a GPU each operation is a launch, which larger pieces repay. Both divide 2**32: see _pieces.
PIECE_ON_HOST = 1 << 14
PIECE_ON_GPU = 1 << 20


# --- Philox, written once -------------------------------------------------------------------------------


class _Lane(Protocol):
    def __xor__(self, other: Self | int, /) -> Self: ...


_L = TypeVar("_L", bound=_Lane)


def philox4x32(
    counter: Sequence[_L],
    keys: Sequence[tuple[_L | int, _L | int]],
    mulhilo: Callable[[int, _L], tuple[_L, _L]],
) -> tuple[_L, _L, _L, _L]:
    """Four output words of Philox4x32 for a counter of four 32-bit lanes: one round per pair of ``keys``.

    A lane is anything with ``^`` for which ``mulhilo(constant, lane)`` gives the high and the low 32 bits of
    the product: an array, a Python int, or a node of a traced program.

    J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        hi0, lo0 = mulhilo(PHILOX_MULTIPLIERS[0], c0)
        hi1, lo1 = mulhilo(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The key of each round: the seed's two halves, each stepped by a constant modulo 2**32."""
    low, high = seed & MASK32, seed >> 32
    step0, step1 = PHILOX_KEY_STEPS
    return [((low + r * step0) & MASK32, (high + r * step1) & MASK32) for r in range(PHILOX_ROUNDS)]


def _mulhilo_unsigned(constant: int, lane: Array) -> tuple[Array, Array]:
    product = lane * constant
    return product >> 32, product & MASK32


def _mulhilo_signed(constant: int, lane: Array) -> tuple[Array, Array]:
    # The product of two 32-bit words may set the sign bit of an int64; the shift then copies it downwards.
    product = lane * constant
    return (product >> 32) & MASK32, product & MASK32


# --- Words and keep masks -------------------------------------------------------------------------------


def words(seed: int, stream: int, n: int, xp: object = None, *, start_block: int = 0, device: Device = None) -> Any:
    """``n`` random 32-bit words of a stream, as a one-dimensional uint32 array.

    Element ``i`` is output word ``i % 4`` of the Philox4x32-10 block ``start_block + i // 4``.

    Parameters
    ----------
    seed, stream : int
        In [0, 2**64). Different pairs give unrelated words.
    n : int
        How many words.
    xp : namespace, optional
        An Array API namespace (``numpy``, ``cupy``, ``torch``, ``jax.numpy``, ``array_api_strict``); NumPy
        when left out. The words are the same in each. A namespace whose 64-bit integers are missing or
        unproven (JAX among them) has its words drawn by NumPy and converted.
    start_block : int, optional
        The block of the first word; four words to a block. Blocks run from 0 to 2**64 - 1.
    device : optional
        A device of ``xp``; its default device when left out. It is not used where NumPy draws the words.

    Raises
    ------
    TypeError, ValueError
        For an argument that is no integer or is out of range.

    Notes
    -----
    Source: Salmon et al., SC'11; the words are those of Random123's ``philox4x32`` with ten rounds. NumPy's own
    ``Philox`` is the 64-bit variant (4x64) and gives other words.

    Examples
    --------
    >>> import xpoptim as xo
    >>> xo.random.words(seed=0, stream=0, n=5)
    array([1713891541, 3781805453, 3159862348, 2600524760, 4175744164],
          dtype=uint32)
    >>> xo.random.words(seed=0, stream=0, n=1, start_block=1)
    array([4175744164], dtype=uint32)
    """
    seed = checked_int("seed", seed, 2**64)
    stream = checked_int("stream", stream, 2**64)
    n = checked_int("n", n, 2**63)
    start_block = checked_int("start_block", start_block, 2**64)
    if start_block + _blocks(n) > 2**64:
        raise ValueError(f"start_block={start_block} leaves fewer than the {_blocks(n)} blocks that n={n} needs")

    xp = standard(xp)
    with library_behind(xp).on(device):
        return _draw(None, seed, stream, n, start_block, xp, device)


def keep_mask(
    seed: int, stream: int, shape: tuple[int, ...], ratio: float, *, xp: object = None, device: Device = None
) -> Array:
    """A bool array, True where dropout keeps the element: where its word is at least :func:`threshold`."""
    xp = standard(xp)
    limit = threshold(ratio)
    if limit in (0, 2**32):  # nothing or everything is dropped: no word needs to be drawn
        return xp.full(shape, limit == 0, dtype=xp.bool, device=device)

    return xp.reshape(_draw(limit, seed, stream, math.prod(shape), 0, xp, device), shape)


def kept(word: Any, limit: Any) -> Any:
    """Whether an element is kept: its word against `threshold`."""
    return word >= limit


def threshold(ratio: float) -> int:
    """An element is dropped if its word is below this: ``round(ratio * 2**32)``, half to even."""
    return round(ratio * 2**32)


def _draw(limit: int | None, seed: int, stream: int, n: int, start_block: int, xp: Namespace, device: Device) -> Array:
    """``n`` words, or what is `kept` by them, piece by piece, so that no temporary grows with ``n``."""
    library = library_behind(xp)
    if not library.wrapping_products:
        return xp.asarray(_draw(limit, seed, stream, n, start_block, standard(None), None))

    # torch has no uint64 arithmetic; its int64 product wraps to the same bits.
    unsigned = library.unsigned_integers
    mulhilo, lane_dtype = (_mulhilo_unsigned, xp.uint64) if unsigned else (_mulhilo_signed, xp.int64)
    piece = PIECE_ON_GPU if library.launches(device) else PIECE_ON_HOST
    keys = round_keys(seed)
    out = xp.empty(n, dtype=xp.uint32 if limit is None else xp.bool, device=device)
    for first, stop in _pieces(start_block, start_block + _blocks(n), piece):
        low, high = first & MASK32, first >> 32
        block_low = xp.arange(low, low + (stop - first), dtype=lane_dtype, device=device)
        counter: tuple[Any, ...] = (block_low, high, stream & MASK32, stream >> 32)
        drawn = philox4x32(counter, keys, mulhilo)
        lanes = [xp.astype(lane, xp.uint32) if limit is None else kept(lane, limit) for lane in drawn]
        begin = 4 * (first - start_block)
        end = min(n, begin + 4 * (stop - first))
        out[begin:end] = xp.reshape(xp.stack(lanes, axis=1), (-1,))[: end - begin]
    return out


def _blocks(n: int) -> int:
    return (n + 3) // 4


def _pieces(start: int, stop: int, piece: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of blocks. None crosses a multiple of 2**32, so that each has one high word, an int."""
    while start < stop:
        end = min(stop, (start // piece + 1) * piece)
        yield start, end
        start = end


# --- Seeds ----------------------------------------------------------------------------------------------

MAX_LAYERS = 2**31


class _Numbering(NamedTuple):
    """How layers without a seed of their own are numbered, and the number that the latest of them got."""

    seed: int | None = None
    next_layer: int = 0
    latest: int = 0

    def claimed(self, layer: int) -> _Numbering:
        if self.seed is None:
            return self._replace(latest=layer)
        number = layer or self.next_layer
        if number >= MAX_LAYERS:
            raise ValueError(f"no layer number below {MAX_LAYERS} is free: call xpoptim.random.seed(s) to start again")
        return self._replace(next_layer=max(self.next_layer, number + 1), latest=number)


_numbering = Atomic(_Numbering())


def seed(s: int | None) -> None:
    """Set the seed of every :class:`xpoptim.Dropout` that is created from now on without a seed of its own.

    Each of them takes ``s`` and the next free layer number, from 0: two runs that create their layers in the
    same order after the same ``seed(s)`` draw the same masks. Layers that exist already are left alone. The
    setting is global to the process, for all threads.

    Parameters
    ----------
    s : int or None
        In [0, 2**64). None forgets the seed: layers draw theirs from the operating system again.

    Examples
    --------
    >>> import xpoptim as xo
    >>> xo.random.seed(7)
    >>> xo.Dropout(0.2), xo.Dropout(0.5)
    (Dropout(0.2, seed=7, layer=0), Dropout(0.5, seed=7, layer=1))
    >>> xo.random.seed(None)
    """
    fresh = _Numbering(None if s is None else checked_int("s", s, 2**64))
    _numbering.change(lambda _: fresh)


def claim_layer(layer: int = 0) -> tuple[int, int]:
    """(seed, layer) for a layer without a seed of its own.

    Under a global seed, 0 gets the next free number. Another number is taken as it is, and the numbers handed out
    afterwards lie above it. Without a global seed: a fresh seed, and the layer as given.
    """
    claim = _numbering.change(lambda numbering: numbering.claimed(layer))
    return int.from_bytes(os.urandom(8)) if claim.seed is None else claim.seed, claim.latest


def checked_int(name: str, value: Any, stop: int) -> int:
    """``value`` as an int in ``[0, stop)``; errors name the argument."""
    allowed = f"an integer in [0, 2**{stop.bit_length() - 1})"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, not {value!r} of type {type(value).__name__}") from None
    if not 0 <= number < stop:
        raise ValueError(f"{name} must be {allowed}, not {number}")
    return number
