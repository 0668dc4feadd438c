"""The valley ``z = x²/20 + y²`` and the ways optimizers take down into it, with Python floats as parameters.

Saito, *Deep Learning from Scratch*, chapter 6, shows these four ways with these settings.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

import xpoptim as xo

START = (-7.0, 2.0)
UPDATES = 30


_T = TypeVar("_T", float, np.ndarray)


def height(x: _T, y: _T) -> _T:
    """The valley, steep in y and almost flat in x; its lowest point is (0, 0)."""
    return x**2 / 20 + y**2


def slope(x: float, y: float) -> dict[str, float]:
    """Gradient of `height`."""
    return {"x": x / 10, "y": 2 * y}


def optimizers() -> dict[str, xo.SGD | xo.Momentum | xo.AdaGrad | xo.Adam]:
    """The book's four, with its learning rates."""
    return {
        "SGD": xo.SGD(lr=0.95),
        "Momentum": xo.Momentum(lr=0.1),
        "AdaGrad": xo.AdaGrad(lr=1.5),
        "Adam": xo.Adam(lr=0.3),
    }


def path(optimizer: xo.Optimizer, updates: int = UPDATES) -> list[tuple[float, float]]:
    """The points visited from `START` on, `updates` + 1 of them.

    Examples
    --------
    >>> import xpoptim as xo
    >>> path(xo.SGD(lr=0.5), updates=1)
    [(-7.0, 2.0), (-6.65, 0.0)]
    """
    params = {"x": START[0], "y": START[1]}  # floats are rebound in the dict by each update
    points = [START]
    for _ in range(updates):
        optimizer.update(params, slope(params["x"], params["y"]))
        points.append((params["x"], params["y"]))
    return points
