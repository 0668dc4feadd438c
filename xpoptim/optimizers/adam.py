"""Adam and its kin: running means of the gradient and of its square, corrected for their start at zero."""

from __future__ import annotations

from typing import Any

from ..optimizer import Optimizer
from ..recipe.hyperparameters import Fraction, NonNegative


class Adam(Optimizer):
    """Adam (Kingma & Ba, 2015), with the bias correction folded into the learning rate (their section 2).

    ``lr_t = lr*sqrt(1-beta2**t)/(1-beta1**t); m += (1-beta1)*(g-m); v += (1-beta2)*(g*g-v);
    p -= lr_t*m/(sqrt(v)+eps)``

    The book, Chainer, thinc and Keras have this form. torch and optax add eps to the *corrected* root instead, so
    that theirs is larger by ``1/sqrt(1-beta2**t)`` in early steps.

    Parameters
    ----------
    lr : float or schedule, default 0.001
        The learning rate, at least 0.
    beta1 : float or schedule, default 0.9
        What the mean of gradients keeps in a step, at least 0 and below 1.
    beta2 : float or schedule, default 0.999
        What the mean of squares keeps in a step, at least 0 and below 1.
    eps : float or schedule, default 1e-07
        Added to the root, so that nothing is divided by 0; at least 0.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0, 1.0])}
    >>> xo.Adam(lr=0.1, eps=0).update(params, {"W": np.array([3.0, -0.5])})
    >>> params["W"].round(6)
    array([0.9, 1.1])
    """

    lr: NonNegative = 0.001
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: NonNegative = 1e-7
    slots = ("m", "v")

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, m: Any, v: Any, *, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any) -> Any:
        lr_t = lr * xp.sqrt(1 - beta2**t) / (1 - beta1**t)
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        return p - lr_t * m / (xp.sqrt(v) + eps), m, v


class AdamW(Adam, kw_only=True):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    ``p *= 1 - lr*weight_decay``, then Adam's.

    weight_decay is 0.01, as in torch; optax has 1e-4 and Keras 0.004.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.array([1.0])}
    >>> xo.AdamW(lr=0.1, weight_decay=0.5).update(params, {"W": np.array([0.0])})
    >>> params["W"].round(6)
    array([0.95])
    """

    weight_decay: NonNegative = 0.01
    decoupled: bool = True
