"""Step sizes from the history of each element's squared gradients."""

from __future__ import annotations

from typing import Any

from ..optimizer import Optimizer


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan & Singer, 2011).

    ``h += g*g; p -= lr*g/(sqrt(h)+eps)``

    h starts at 0, as in the book, Chainer and torch; Keras and optax start it at 0.1.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0, 1.0])}
    >>> xo.AdaGrad(lr=0.1, eps=0).update(params, {"W": np.array([3.0, -0.5])})
    >>> params["W"]
    array([0.9, 1.1])
    """

    lr: float = 0.01
    eps: float = 1e-7
    slots = ("h",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, h: Any, *, lr: Any, eps: Any) -> Any:
        h = h + g * g
        return p - lr * g / (xp.sqrt(h) + eps), h


class RMSprop(Optimizer):
    """RMSprop (Tieleman & Hinton, 2012).

    ``h = decay_rate*h + (1-decay_rate)*g*g; p -= lr*g/(sqrt(h)+eps)``

    eps is outside the root, as in the book, torch and Chainer; Keras and optax put it inside.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0])}
    >>> xo.RMSprop(lr=0.01, eps=0).update(params, {"W": np.array([5.0])})
    >>> params["W"].round(6)
    array([0.9])
    """

    lr: float = 0.01
    decay_rate: float = 0.99
    eps: float = 1e-7
    slots = ("h",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, h: Any, *, lr: Any, decay_rate: Any, eps: Any) -> Any:
        h = decay_rate * h + (1 - decay_rate) * g * g
        return p - lr * g / (xp.sqrt(h) + eps), h
