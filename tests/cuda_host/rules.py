"""Rules that are hard on a generator of CUDA text."""

from typing import Any

import xpoptim as xo


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


NAMES = ("s", "at", "row", "float", "length", "scalars", "m", "m_", "m_pack", "new_m", "x_m", "größe", "a b", "a-b")


class Names(xo.Optimizer):
    """Slots and hyperparameters named like words of C++, of CUDA and of the generated text."""

    lr: float = 0.5
    at: float = 2.0
    state: float = 3.0
    größe: float = 0.25
    double: float = 1.5
    slots = dict.fromkeys(NAMES, 0.5)

    @staticmethod
    def rule(
        xp: Any, p: Any, g: Any, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any, s8: Any,
        s9: Any, s10: Any, s11: Any, s12: Any, s13: Any, *, lr: Any, at: Any, state: Any, größe: Any, double: Any,
    ) -> Any:  # fmt: skip
        slots = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13)
        news = [s * größe + number * g for number, s in enumerate(slots)]
        return p - lr * at * sum(news, g) / (state * double), *news
