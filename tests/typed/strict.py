"""What a user may write who has the strictest of checks. The tests run it, too."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, assert_type

import numpy as np
import numpy.typing as npt
from annotated_types import Interval

import xpoptim as xo

Floats = npt.NDArray[np.float64]


class Signs(xo.Optimizer):
    lr: xo.Hyper = 1e-2
    beta: Annotated[xo.Hyper, Interval(ge=0, lt=1)] = 0.9
    mode: Literal["sign", "plain"] = "sign"
    nesterov: bool = False
    slots = ("m",)

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, m: Any, *, lr: Any, beta: Any, mode: str, nesterov: bool) -> Any:
        m = beta * m + (1 - beta) * g
        d = beta * m + (1 - beta) * g if nesterov else m
        return p - lr * (xp.sign(d) if mode == "sign" else d), m


class Started(xo.Optimizer):
    lr: float = 0.1
    slots = {"anchor": lambda p: p, "h": 0.1}  # noqa: RUF012

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, anchor: Any, h: Any, *, t: Any, lr: Any) -> Any:
        h = h + g * g
        return xp.where(t > 10, anchor, p - lr * g / xp.sqrt(h)), anchor, h


def halving(step: int) -> float:
    return 0.5**step


def train(opt: xo.Optimizer, steps: int = 3) -> Floats:
    params: dict[str, Floats] = {"W": np.ones(3)}
    for _ in range(steps):
        opt.update(params, {"W": 2 * params["W"]})
    return params["W"]


def constructors() -> list[xo.Optimizer]:
    schedule: Callable[[int], float] = halving
    return [
        xo.SGD(0.1),
        xo.Momentum(lr=schedule, momentum=0.8),
        xo.Nesterov(lr=halving),
        xo.AdaGrad(eps=1e-8),
        xo.RMSprop(decay_rate=0.9, clip_value=schedule),
        xo.Adam(lr=lambda step: 0.1 / (1 + step), clip_norm=1.0, maximize=True),
        xo.AdamW(1e-3, weight_decay=schedule, decoupled=True),
        Signs(lr=schedule, beta=0.5, mode="plain", nesterov=True),
        Started(),
    ]


def assigned(opt: xo.Adam) -> None:
    opt.lr = halving
    opt.lr = 0.1
    opt.lr *= 0.5
    opt.clip_norm = None
    lr: xo.Hyper = xo.Adam().lr
    assert_type(opt.decoupled, bool)
    assert_type(Signs().mode, Literal["sign", "plain"])
    print(lr if not callable(lr) else lr(0))


def steps(opt: xo.Adam) -> None:
    params: tuple[Floats, float] = (np.ones(2), 1.0)
    state = opt.init(params)
    params, state = opt.apply(params, (np.ones(2), 1.0), state)
    opt.update([np.ones(2)], [np.ones(2)])
    assert_type(state["step"], int)
    print(state["slots"]["m"]["0"])
    assert_type(opt.skipped, int)
    opt.check()
    saved = opt.state_dict()
    print(saved["class"])
    again = xo.Adam()
    again.load_state_dict(saved)
    print(again.state["step"], again.state["slots"]["m"]["0"])


def looked_inside(opt: xo.Optimizer) -> None:
    params = {"W": np.ones(3)}
    with xo.engine("reference"):
        for row in opt.explain(params, params):
            assert_type(row.key, str)
            print(row.engine, row.reason)
    text = opt.source("graph", dtype="float32", grad_dtype="float16")
    print(text.splitlines())
    Path("unused").with_suffix("." + str(len(opt.explain(params))))


def dropped() -> Floats:
    xo.random.seed(0)
    drop = xo.Dropout(0.5, inverted=True, seed=1, broadcast_axes=(0,))
    x: Floats = np.ones((2, 3))
    y = drop.forward(x)
    assert_type(y, Floats)
    assert_type(drop(x, train_flg=False), Floats)
    assert_type(drop.backward(y, call=drop.call), Floats)
    assert_type(xo.dropout(x, 0.5, seed=0, stream=1), Floats)
    drop.dropout_ratio, drop.inverted, drop.broadcast_axes = 0.25, False, 0
    assert_type(drop.dropout_ratio, float)
    assert_type(drop.seed, int)
    print(drop.mask.shape, drop.layer)
    other = xo.Dropout()
    other.load_state_dict(drop.state_dict())
    print(xo.random.words(0, 1, 5))
    return y


def main() -> None:
    before = xo.get_num_threads()
    xo.set_num_threads(before)
    for opt in constructors():
        train(opt)
    assigned(xo.Adam())
    steps(xo.Adam())
    looked_inside(xo.Momentum())
    dropped()
    try:
        train(Signs())
    except xo.TraceError as error:
        print(error)


main()
