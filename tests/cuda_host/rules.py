"""Rules that are hard on a generator of CUDA text."""

from typing import Any, ClassVar

import xpoptim as xo


class Assign(xo.Optimizer):
    """The gradient becomes the parameter, untouched: all that happens to it is to be loaded and stored."""

    @staticmethod
    def rule(xp: Any, p: Any, g: Any) -> Any:
        return g


class Everything(xo.Optimizer):
    """Every operation and every sort of constant, on scalars and on arrays."""

    lr: float = 0.1
    beta: float = 0.5
    flag: bool = True
    slots = ("a", "b")

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, a: Any, b: Any, *, lr: Any, beta: Any, flag: bool, t: Any) -> Any:
        constants = (float("inf"), float("-inf"), float("nan"), 1e-45, -0.0, 5e-324, 3.4e38, 1e39, 1 / 3)
        total = g
        for number, constant in enumerate(constants):
            total = xp.where(p > number, total + constant, xp.where(p == constant, -total, total * 0.5))
        small = xp.logical_and(lr < 1.0, xp.isfinite(beta))
        odd = xp.logical_xor(g != p, xp.logical_not(g <= a))
        total = xp.where(small, total, p)
        total = xp.where(xp.logical_or(odd, g >= b), total, xp.clip(g, -beta, lr))
        total = xp.where(xp.isfinite(total), total, xp.square(xp.minimum(p, 2.0)))
        bias = xp.sqrt(1 - beta**t) / (1 - beta**2) if flag else 1.0
        new = p - lr * bias * xp.sign(total) * xp.sqrt(xp.abs(g)) / xp.maximum(xp.abs(a), 1e-3)
        return xp.where(new == new, new, -p), a + xp.where(g < p, 1.0, -0.0), -b * beta**-3 + xp.where(True, g, p)


NAMES = ("s", "row", "float", "length", "scalars", "m", "m_", "m_pack", "new_m", "x_m", "größe", "größe_", "__m")


class Names(xo.Optimizer):
    """Slots and hyperparameters named like words of C++, of CUDA and of the generated text."""

    lr: float = 0.5
    at: float = 2.0
    words: float = 3.0
    breite_ß: float = 0.25
    double: float = 1.5
    slots: ClassVar = dict.fromkeys(NAMES, 0.5)

    @staticmethod
    def rule(
        xp: Any, p: Any, g: Any, s: Any, row: Any, float: Any, length: Any, scalars: Any, m: Any, m_: Any, m_pack: Any,
        new_m: Any, x_m: Any, größe: Any, größe_: Any, __m: Any, *, lr: Any, at: Any, words: Any, breite_ß: Any,
        double: Any,
    ) -> Any:  # fmt: skip
        slots = (s, row, float, length, scalars, m, m_, m_pack, new_m, x_m, größe, größe_, __m)
        news = [slot * breite_ß + number * g for number, slot in enumerate(slots)]
        return p - lr * at * sum(news, g) / (words * double), *news
