"""The options every optimizer has: small pure functions before or after the rule, traced together with it.

An option runs in the rule's own pass over memory, in the order of `BEFORE` and `AFTER`, and only if it is switched on.
To add one: a field of `Optimizer`, a function here, its place in the order, and a test.
"""

from __future__ import annotations

from typing import Any

from ..trace.language import Functions, Value
from .recipe import Option


def clip_value(xp: Functions, g: Value, *, clip_value: Value) -> Value:
    """Each element into [-clip_value, clip_value]; a NaN stays."""
    return xp.clip(g, -clip_value, clip_value)


def clip_norm(xp: Functions, g: Value, *, clip_norm: Value, norm: Value) -> Value:
    """All gradients by one factor, so that their global L2 norm is at most clip_norm. It is 1 for a norm of 0 too."""
    return xp.minimum(1.0, clip_norm / norm) * g


def maximize(xp: Functions, g: Value) -> Value:
    return -g


def l2_decay(xp: Functions, g: Value, p: Value, *, weight_decay: Value) -> Value:
    """The gradient of weight_decay/2 * ||p||², added to the gradient."""
    return g + weight_decay * p


def decoupled_decay(xp: Functions, p: Value, *, lr: Value, weight_decay: Value) -> Value:
    """Decay apart from the gradient (Loshchilov & Hutter, 2019)."""
    return p * (1 - lr * weight_decay)


def _decays(opt: Any) -> bool:
    return callable(opt.weight_decay) or opt.weight_decay != 0.0


BEFORE = (
    Option(clip_value, lambda opt: opt.clip_value is not None),
    Option(clip_norm, lambda opt: opt.clip_norm is not None, reduction="norm"),
    Option(maximize, lambda opt: opt.maximize),
    Option(l2_decay, lambda opt: _decays(opt) and not opt.decoupled),
    Option(decoupled_decay, lambda opt: _decays(opt) and opt.decoupled),
)
AFTER: tuple[Option, ...] = ()
