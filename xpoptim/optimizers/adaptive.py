"""Step sizes from the history of each element's squared gradients."""

from __future__ import annotations

from typing import Any

from ..optimizer import Optimizer
from ..recipe.hyperparameters import Fraction, NonNegative


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan & Singer, 2011).

    ``h += g*g; p -= lr*g/(sqrt(h)+eps)``

    h starts at 0, as in the book, Chainer and torch; Keras and optax start it at 0.1.

    Parameters
    ----------
    lr : float or schedule, default 0.01
        The learning rate, at least 0.
    eps : float or schedule, default 1e-07
        Added to the root, so that nothing is divided by 0; at least 0.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0, 1.0])}
    >>> xo.AdaGrad(lr=0.1, eps=0).update(params, {"W": np.array([3.0, -0.5])})
    >>> params["W"]
    array([0.9, 1.1])
    """

    lr: NonNegative = 0.01
    eps: NonNegative = 1e-7
    slots = ("h",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, h: Any, *, lr: Any, eps: Any) -> Any:
        h = h + g * g
        return p - lr * g / (xp.sqrt(h) + eps), h


class RMSprop(Optimizer):
    """RMSprop (Tieleman & Hinton, 2012).

    ``h = decay_rate*h + (1-decay_rate)*g*g; p -= lr*g/(sqrt(h)+eps)``

    eps is outside the root, as in the book, torch and Chainer; Keras and optax put it inside.

    Parameters
    ----------
    lr : float or schedule, default 0.01
        The learning rate, at least 0.
    decay_rate : float or schedule, default 0.99
        What the mean of squares keeps in a step, at least 0 and below 1.
    eps : float or schedule, default 1e-07
        Added to the root, so that nothing is divided by 0; at least 0.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0])}
    >>> xo.RMSprop(lr=0.01, eps=0).update(params, {"W": np.array([5.0])})
    >>> params["W"].round(6)
    array([0.9])
    """

    lr: NonNegative = 0.01
    decay_rate: Fraction = 0.99
    eps: NonNegative = 1e-7
    slots = ("h",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, h: Any, *, lr: Any, decay_rate: Any, eps: Any) -> Any:
        h = decay_rate * h + (1 - decay_rate) * g * g
        return p - lr * g / (xp.sqrt(h) + eps), h
