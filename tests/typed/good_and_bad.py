"""Lines that type checkers must refuse, marked as errors, among lines that they must take. It is read, never run."""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge

import xpoptim as xo


def schedule(step: int) -> float:
    return 0.1 / (1 + step)


# --- constructors

xo.Adam()
xo.Adam(1e-3, 0.9, 0.999, 1e-7)
xo.Adam(lr=1)
xo.Adam(lr=schedule)
xo.Adam(lr=lambda step: 0.1 / (1 + step), weight_decay=schedule, clip_norm=float("inf"), maximize=True)
xo.Adam(clip_norm=None, clip_value=schedule)
xo.AdamW(1e-3, 0.9, 0.999, 1e-7, weight_decay=0.1, decoupled=False)
xo.SGD(0.1, capturable=True)

xo.Adam(learning_rate=1)  # error
xo.Adam(lr="0.1")  # error
xo.Adam(lr=None)  # error
xo.Adam(lr=[0.1])  # error
xo.Adam(lr=lambda step: str(step))  # error
xo.Adam(lr=max)  # error
xo.Adam(maximize="yes")  # error
xo.Adam(slots=("m",))  # error
xo.Adam(fused=False)  # error
xo.Adam(_version=None)  # error
xo.Adam(0.001, 0.9, 0.999, 1e-7, 0.1)  # error
xo.AdamW(0.001, 0.9, 0.999, 1e-7, 0.1)  # error
xo.SGD(0.1, 0.0)  # error
xo.SGD([np.zeros(3)])  # error

# --- attributes

opt = xo.Adam(lr=schedule)
opt.lr = schedule
opt.lr = 0.1
opt.lr *= 0.5  # a float was assigned just before
opt.clip_norm = None

other = xo.Adam()
other.lr *= 0.5  # error
if not callable(other.lr):
    other.lr *= 0.5
other.lrr = 1  # error
other.learning_rate = 0.1  # error
other.lr = "0.1"  # error
other.lr = None  # error
other.decoupled = "yes"  # error
other.state = {}  # error
other.step()  # error
print(other.momentum)  # error

# --- methods and functions

with xo.engine("reference"):
    other.update({"W": np.zeros(3)}, {"W": np.ones(3)})
xo.engine("cuda")  # error
other.source("cuda")
other.source("llvm", "bfloat16", grad_dtype="float32")
other.source("ptx")  # error
other.source("graph", dtype="int8")  # error
other.source("graph", "float32", "float8")  # error
xo.set_num_threads("2")  # error

drop = xo.Dropout(0.5, inverted=True)
drop.dropout_ratio = 0.25
drop.ratio = 0.25  # error
print(drop.rate)  # error
xo.Dropout(p=0.5)  # error

# --- rules of one's own


class Mine(xo.Optimizer):
    lr: xo.Hyper = 1e-2
    rho: Annotated[xo.Hyper, Ge(0)] = 0.5
    beta: float = 0.9
    nesterov: bool = False
    mode: Literal["sign", "plain"] = "sign"
    slots = ("m",)

    @staticmethod
    def rule(xp, p, g, m, *, lr, rho, beta, nesterov, mode):
        m = beta * m + (1 - beta) * g
        step = xp.sign(m) if mode == "sign" else m
        return p - lr * rho * (step + g if nesterov else step), m


Mine()
Mine(lr=schedule)
Mine(0.1, schedule, 0.9, True, "plain", weight_decay=0.1)
Mine(mode="plain").mode = "sign"
Mine(lrr=1)  # error
Mine(beta=schedule)  # error
Mine(mode="other")  # error
Mine(nesterov="no")  # error
Mine(0.1, 0.5, 0.9, False, "sign", 0.1)  # error
Mine().mode = "other"  # error
Mine().rhoo = 1  # error


class Needed(xo.Optimizer):
    lr: float

    @staticmethod
    def rule(xp, p, g, *, lr):
        return p - lr * g


Needed(0.1)
Needed()  # error


class WithDecay(xo.Adam, kw_only=True):
    """A default of its own for an option, which stays keyword-only, and an argument that is so, too."""

    weight_decay: xo.Hyper = 0.1
    unused: float = 1.0


WithDecay(0.001, 0.9, 0.999, 1e-7, weight_decay=0.2, unused=2.0)
WithDecay(0.001, 0.9, 0.999, 1e-7, 0.2)  # error


class OtherDefaults(xo.Adam):
    """Without annotations the declarations stay as they are."""

    lr = 3e-4
    weight_decay = 0.1


OtherDefaults(0.001, 0.9, 0.999, 1e-7, weight_decay=0.2)
OtherDefaults(0.001, 0.9, 0.999, 1e-7, 0.2)  # error


class OfItsOwn(xo.Adam):
    def __init__(self, size: int) -> None:
        super().__init__(lr=1 / size)


OfItsOwn(3)
OfItsOwn(size=3).lr = schedule
OfItsOwn(lr=0.1)  # error
