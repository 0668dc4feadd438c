"""Seven optimizers as plain array code, one dict entry at a time: what the demo's timing is compared with.

This is the textbook way to write them: each line is a few NumPy calls and each call a pass over memory with
a temporary array. The formulas are those of the fused optimizers. They are here only to be timed; for
training take the ones of :mod:`xpoptim`. Scalars are computed with :mod:`math`, so that no float64 scalar
of NumPy's widens float32 arrays and slows this side down.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import ModuleType
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]  # or CuPy's
Slots = defaultdict[str, Any]  # arrays after the first step, which finds 0.0


class PlainSGD:
    def __init__(self, lr: float) -> None:
        self.lr = lr

    def update(self, params: Arrays, grads: Arrays) -> None:
        for key in params:
            params[key] -= self.lr * grads[key]


class PlainMomentum:
    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum
        self.v: Slots = defaultdict(float)

    def update(self, params: Arrays, grads: Arrays) -> None:
        for key in params:
            self.v[key] = self.momentum * self.v[key] - self.lr * grads[key]
            params[key] += self.v[key]


class PlainNesterov(PlainMomentum):
    def update(self, params: Arrays, grads: Arrays) -> None:
        for key in params:
            params[key] += self.momentum**2 * self.v[key] - (1 + self.momentum) * self.lr * grads[key]
            self.v[key] = self.momentum * self.v[key] - self.lr * grads[key]


class PlainAdaGrad:
    def __init__(self, lr: float, xp: ModuleType, eps: float = 1e-7) -> None:
        self.lr, self.xp, self.eps = lr, xp, eps
        self.h: Slots = defaultdict(float)

    def update(self, params: Arrays, grads: Arrays) -> None:
        for key in params:
            self.h[key] += grads[key] * grads[key]
            params[key] -= self.lr * grads[key] / (self.xp.sqrt(self.h[key]) + self.eps)


class PlainRMSprop(PlainAdaGrad):
    decay_rate = 0.99

    def update(self, params: Arrays, grads: Arrays) -> None:
        for key in params:
            self.h[key] *= self.decay_rate
            self.h[key] += (1 - self.decay_rate) * grads[key] * grads[key]
            params[key] -= self.lr * grads[key] / (self.xp.sqrt(self.h[key]) + self.eps)


class PlainAdam:
    weight_decay = 0.0

    def __init__(self, lr: float, xp: ModuleType, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-7) -> None:
        self.lr, self.xp, self.beta1, self.beta2, self.eps = lr, xp, beta1, beta2, eps
        self.t = 0
        self.m: Slots = defaultdict(float)
        self.v: Slots = defaultdict(float)

    def update(self, params: Arrays, grads: Arrays) -> None:
        self.t += 1
        lr_t = self.lr * math.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)
        for key in params:
            if self.weight_decay:
                params[key] *= 1 - self.lr * self.weight_decay
            self.m[key] += (1 - self.beta1) * (grads[key] - self.m[key])
            self.v[key] += (1 - self.beta2) * (grads[key] * grads[key] - self.v[key])
            params[key] -= lr_t * self.m[key] / (self.xp.sqrt(self.v[key]) + self.eps)


class PlainAdamW(PlainAdam):
    weight_decay = 0.01
