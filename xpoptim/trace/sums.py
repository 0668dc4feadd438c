"""The one tree by which squares are summed, so that a norm has the same bits on every engine.

The squares of a tensor, in logical C order and float64, are cut into chunks of `CHUNK`. Within a chunk,
`LANES` lanes each add up every `LANES`-th element in order; then the upper half of the lanes is added to
the lower half until one is left. Chunk sums are added pairwise, neighbour to neighbour, until one is left. The
tensors' sums are added one after the other, in sorted order of their keys. Missing elements count as +0,
which changes no bit. A complex element is its real part followed by its imaginary part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays.namespaces.lookup import device_of
from ..arrays.types import Array, Namespace

CHUNK = 4096
LANES = 256


def chunk_sums(xp: Namespace, squares: Array) -> Array:
    """One float64 sum for each chunk of a one-dimensional float64 array."""
    missing = -squares.shape[0] % CHUNK
    if missing:
        squares = xp.concat([squares, xp.zeros((missing,), dtype=xp.float64, device=device_of(squares))])
    rows = xp.reshape(squares, (-1, CHUNK // LANES, LANES))
    lanes = xp.zeros_like(rows[:, 0, :])
    for row in range(CHUNK // LANES):
        lanes = lanes + rows[:, row, :]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]


def fold(xp: Namespace, sums: Array) -> Array:
    """The sum of a tensor from the sums of its chunks: neighbours are added until one is left."""
    while sums.shape[0] > 1:
        if sums.shape[0] % 2:
            sums = xp.concat([sums, xp.zeros((1,), dtype=xp.float64, device=device_of(sums))])
        sums = sums[0::2] + sums[1::2]
    return sums[0]


def add_in_order(sums: Sequence[float]) -> float:
    """The tensors' sums, one after the other; the caller has sorted them by key."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.add.accumulate(np.asarray(sums, np.float64))[-1]) if len(sums) else 0.0
