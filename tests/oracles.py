"""Float64 scalar loops of the update rules, written from the papers and the book.

Nothing of the package is imported here, and nothing is shared with it: one parameter element, one Python
float, one formula at a time. Where a paper has two equivalent forms, the form *not* used by the package is taken,
so that an algebra mistake cannot hide in both.

Each rule is ``step(t, p, g, slots, **hyperparameters) -> new p``; ``slots`` is the element's own dict of floats and is
written to. `trajectory` runs a rule over whole vectors, with the options in their documented order.
"""

import math
from collections.abc import Callable, Mapping, Sequence

Schedule = Callable[[int], float]


def sgd(t: int, p: float, g: float, slots: dict, *, lr: float) -> float:
    """Gradient descent."""
    return p - lr * g


def momentum(t: int, p: float, g: float, slots: dict, *, lr: float, momentum: float) -> float:
    """Polyak (1964), with the learning rate inside the velocity, as in the book, section 6.1.4."""
    slots["v"] = momentum * slots.get("v", 0.0) - lr * g
    return p + slots["v"]


def nesterov(t: int, p: float, g: float, slots: dict, *, lr: float, momentum: float) -> float:
    """Sutskever et al. (2013), eqs. 3 and 4.

    The array holds the look-ahead point ``y = x + momentum * v`` (Bengio et al., 2012, eqs. 6 and 7): the
    oracle goes back to ``x``, makes the step of the paper there, and looks ahead again.
    """
    v = slots.get("v", 0.0)
    x = p - momentum * v
    v = momentum * v - lr * g
    x = x + v
    slots["v"] = v
    return x + momentum * v


def adagrad(t: int, p: float, g: float, slots: dict, *, lr: float, eps: float) -> float:
    """Duchi et al. (2011), diagonal form; epsilon outside the root."""
    slots["h"] = slots.get("h", 0.0) + g * g
    return p - lr * g / (math.sqrt(slots["h"]) + eps)


def rmsprop(t: int, p: float, g: float, slots: dict, *, lr: float, decay_rate: float, eps: float) -> float:
    """Tieleman and Hinton (2012), lecture 6.5; epsilon outside the root."""
    slots["h"] = decay_rate * slots.get("h", 0.0) + (1.0 - decay_rate) * g * g
    return p - lr * g / (math.sqrt(slots["h"]) + eps)


def adam(t: int, p: float, g: float, slots: dict, *, lr: float, beta1: float, beta2: float, eps: float) -> float:
    """Kingma and Ba (2015), algorithm 1, with the epsilon-hat of the end of section 2.

    Both moments are corrected here as in algorithm 1; ``eps / sqrt(1 - beta2**t)`` next to the corrected root is the
    paper's epsilon-hat next to the uncorrected one.
    """
    slots["m"] = beta1 * slots.get("m", 0.0) + (1.0 - beta1) * g
    slots["v"] = beta2 * slots.get("v", 0.0) + (1.0 - beta2) * g * g
    correction1 = 1.0 - beta1**t
    correction2 = 1.0 - beta2**t
    m_hat = slots["m"] / correction1
    v_hat = slots["v"] / correction2
    return p - lr * m_hat / (math.sqrt(v_hat) + eps / math.sqrt(correction2))


def clip_values(gradient: Sequence[float], limit: float) -> list[float]:
    """Clamp each element into ``[-limit, limit]``."""
    return [max(-limit, min(limit, g)) for g in gradient]


def global_norm(gradient: Sequence[float]) -> float:
    """The Euclidean norm with one rounding of the sum and one of the root, for squares that are exact."""
    return math.sqrt(math.fsum(g * g for g in gradient))


def clip_by_global_norm(gradient: Sequence[float], limit: float) -> list[float]:
    """Scale the whole vector by ``min(1, limit / norm)``."""
    norm = global_norm(gradient)
    scale = min(1.0, limit / norm) if norm else 1.0
    return [g * scale for g in gradient]


def trajectory(
    step: Callable[..., float],
    start: Sequence[float],
    gradients: Sequence[Sequence[float]],
    hyperparameters: Mapping[str, float | Schedule],
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    maximize: bool = False,
) -> list[list[float]]:
    """All iterates of `step` from `start`, one list a gradient.

    The options' order: clip by value, clip by norm, negate, L2 decay into the gradient, decoupled decay of
    the parameter, rule. A callable hyperparameter is a schedule and sees 0 at the first step.
    """
    p = [float(x) for x in start]
    slots: list[dict] = [{} for _ in p]
    iterates = []
    for index, raw in enumerate(gradients):
        now = {name: value(index) if callable(value) else value for name, value in hyperparameters.items()}
        g = [float(x) for x in raw]
        if clip_value is not None:
            g = clip_values(g, clip_value)
        if clip_norm is not None:
            g = clip_by_global_norm(g, clip_norm)
        if maximize:
            g = [-x for x in g]
        if weight_decay and not decoupled:
            g = [gi + weight_decay * pi for gi, pi in zip(g, p, strict=True)]
        if weight_decay and decoupled:
            p = [pi - now["lr"] * weight_decay * pi for pi in p]
        p = [step(index + 1, pi, gi, s, **now) for pi, gi, s in zip(p, g, slots, strict=True)]
        iterates.append(list(p))
    return iterates
