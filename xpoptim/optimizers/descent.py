"""Gradient descent, plain and with momentum."""

from __future__ import annotations

from typing import Any

from ..optimizer import Optimizer
from ..recipe.hyperparameters import Fraction, NonNegative


class SGD(Optimizer):
    """Stochastic gradient descent (Robbins & Monro, 1951).

    ``p -= lr*g``

    Parameters
    ----------
    lr : float or schedule, default 0.01
        The learning rate, at least 0.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0])}
    >>> xo.SGD(lr=0.1).update(params, {"W": np.array([2.0])})
    >>> params["W"]
    array([0.8])
    """

    lr: NonNegative = 0.01

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, *, lr: Any) -> Any:
        return p - lr * g


class Momentum(Optimizer):
    """SGD with momentum, the heavy ball (Polyak, 1964).

    ``v = momentum*v - lr*g; p += v``

    The learning rate is inside the buffer, as in the book, Chainer and Keras. torch and optax keep it outside
    (``b = momentum*b + g; p -= lr*b``), which is the same as long as lr is constant.

    Parameters
    ----------
    lr : float or schedule, default 0.01
        The learning rate, at least 0.
    momentum : float or schedule, default 0.9
        What the buffer keeps in a step, at least 0 and below 1.

    >>> import numpy as np, xpoptim as xo
    >>> params, opt = {"W": np.array([1.0])}, xo.Momentum(lr=0.1)
    >>> for _ in range(2):
    ...     opt.update(params, {"W": np.array([1.0])})
    >>> params["W"].round(6)
    array([0.71])
    """

    lr: NonNegative = 0.01
    momentum: Fraction = 0.9
    slots = ("v",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, v: Any, *, lr: Any, momentum: Any) -> Any:
        v = momentum * v - lr * g
        return p + v, v


class Nesterov(Optimizer):
    """Nesterov's accelerated gradient (Nesterov, 1983), in the form of Bengio et al. (2013).

    ``p += momentum²*v - (1+momentum)*lr*g; v = momentum*v - lr*g``

    The first v is the *old* one: ``p`` is the look-ahead point. It equals ``v = momentum*v - lr*g; p += momentum*v -
    lr*g``, the form of Keras.

    Parameters
    ----------
    lr : float or schedule, default 0.01
        The learning rate, at least 0.
    momentum : float or schedule, default 0.9
        What the buffer keeps in a step, at least 0 and below 1.

    >>> import numpy as np, xpoptim as xo
    >>> params, opt = {"W": np.array([0.0])}, xo.Nesterov(lr=0.1)
    >>> opt.update(params, {"W": np.array([1.0])})
    >>> params["W"].round(6)
    array([-0.19])
    """

    lr: NonNegative = 0.01
    momentum: Fraction = 0.9
    slots = ("v",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, v: Any, *, lr: Any, momentum: Any) -> Any:
        p = p + (momentum**2 * v - (1 + momentum) * lr * g)
        return p, momentum * v - lr * g
