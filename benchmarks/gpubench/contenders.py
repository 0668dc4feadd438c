"""Who takes Adam's steps: each has float32 parameters of its own on the GPU, and all share the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .cases import Case
from .machine import no_torch

ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7}
CLIP = 1.0
SAMPLE = 1000  # elements at either end of a tensor that are compared with the formula
PERIOD = 1_000_003  # after so many elements the random values of an array begin again

Launch = Callable[[], Any]


class NotCaptured(Exception):
    """Why a step cannot be put into a graph."""


class Contender:
    """``step`` is one step. It moves at least ``traffic`` bytes of each element, and touches ``resident``."""

    traffic = 8
    resident = 8

    def step(self) -> Any:
        raise NotImplementedError

    def check(self) -> None:
        """Take the first steps, and compare them with the formula; an AssertionError says what differs."""
        raise NotImplementedError

    def graph(self, steps: int) -> Launch:
        """That launches a graph of so many steps. It may be the last thing that is asked of a contender."""
        raise NotCaptured("its step allocates memory")

    @classmethod
    def missing(cls) -> str:
        """Why it cannot take part, or an empty string."""
        return ""


def random_array(elements: int, seed: int) -> Any:
    """Normal random numbers, drawn on the host, and again after each `PERIOD`."""
    import cupy

    values = np.random.default_rng(seed).standard_normal(min(elements, PERIOD), np.float32)
    drawn, made = cupy.asarray(values), cupy.empty(elements, np.float32)
    for start in range(0, elements, PERIOD):
        piece = made[start : start + PERIOD]
        cupy.copyto(piece, drawn[: piece.size])
    return made


def random_arrays(tensors: int, elements: int, seed: int) -> list[Any]:
    """The same for a list of arrays; small ones are drawn together."""
    if tensors == 1:
        return [random_array(elements, seed)]
    drawn = random_array(elements + 997, seed)
    return [drawn[k % 997 : k % 997 + elements].copy() for k in range(tensors)]


def ends(array: Any) -> np.ndarray:
    """The first and the last elements."""
    return np.concatenate([array[:SAMPLE].get(), array[-SAMPLE:].get()])


def captured(step: Callable[[], Any], steps: int) -> Launch:
    """A graph of steps on CuPy's current stream. The capture ends whatever a step raises."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    stream.begin_capture()
    try:
        for _ in range(steps):
            step()
    finally:
        graph = stream.end_capture()
    return graph.launch


# --- Adam


class Data:
    """Where all contenders start, and gradients."""

    def __init__(self, case: Case, most_for_two: int) -> None:
        sets = 2 if case.total <= most_for_two else 1
        self.start, *self.grads = (random_arrays(case.tensors, case.elements, k) for k in range(sets + 1))


class Adam(Contender):
    traffic = 28  # p, g, m and v are read, p, m and v written
    resident = 16
    corrected_eps = False  # whether eps is added to the corrected root, as in torch
    clips = False

    def __init__(self, data: Data) -> None:
        self.start = data.start
        self.names = [f"W{i}" for i in range(len(data.start))]
        self.params = dict(zip(self.names, [p.copy() for p in data.start], strict=True))
        self.grads = [dict(zip(self.names, g, strict=True)) for g in data.grads]
        self.turn = 0
        self.changing = False

    def next_grads(self) -> dict[str, Any]:
        if self.changing:
            self.turn = (self.turn + 1) % len(self.grads)
        return self.grads[self.turn]

    def check(self, steps: int = 3) -> None:
        """The ends of some tensors against the formula in float64."""
        for _ in range(steps):
            self.step()
        self.compare(steps)
        self.changing = True

    def compare(self, steps: int) -> None:
        from xpoptim.demo.plain import PlainAdam

        scale = 1.0
        if self.clips:
            squares = sum(np.square(g.get(), dtype=np.float64).sum() for g in self.grads[0].values())
            scale = min(1.0, CLIP / math.sqrt(squares))
        for which in {0, len(self.names) // 2, len(self.names) - 1}:
            wide = {"W": ends(self.start[which]).astype(np.float64)}
            g = {"W": ends(self.grads[0][self.names[which]]).astype(np.float64) * scale}
            optimizer = PlainAdam(xp=np, **ADAM)
            for t in range(1, steps + 1):
                if self.corrected_eps:
                    optimizer.eps = ADAM["eps"] * math.sqrt(1 - ADAM["beta2"] ** t)
                optimizer.update(wide, g)
            np.testing.assert_allclose(ends(self.params[self.names[which]]), wide["W"], rtol=2e-5, atol=2e-6)


class Xpoptim(Adam):
    """Gets other gradient arrays at every step, as backpropagation leaves them."""

    resident = 20
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, data: Data) -> None:
        import xpoptim as xo

        super().__init__(data)
        self.optimizer = xo.Adam(**ADAM, **self.options)

    def step(self) -> None:
        self.optimizer.update(self.params, self.next_grads())

    def graph(self, steps: int) -> Launch:
        raise NotCaptured("as a graph it is the contender 'xpoptim, graph'")


class XpoptimClipped(Xpoptim):
    traffic = 32
    clips = True
    options: ClassVar = {"clip_norm": CLIP}


class XpoptimGraph(Xpoptim):
    """A captured update, replayed."""

    resident = 16
    options: ClassVar = {"capturable": True}

    def step(self) -> None:
        if self.optimizer.state["step"] == 0:  # compiles and allocates
            super().step()
            return
        launch = self.graph(1)

        def replay() -> None:
            self.optimizer.prepare_replay()
            launch()

        self.step = replay  # type: ignore[method-assign]
        replay()

    def graph(self, steps: int) -> Launch:
        return captured(lambda: self.optimizer.update(self.params, self.grads[0]), steps)


class CupyCode(Adam):
    """The formulas as plain CuPy code, temporaries and all, as a textbook has them."""

    def __init__(self, data: Data) -> None:
        import cupy

        from xpoptim.demo.plain import PlainAdam

        super().__init__(data)
        self.optimizer = PlainAdam(xp=cupy, **ADAM)

    def step(self) -> None:
        self.optimizer.update(self.params, self.next_grads())


class CupyKernel(Adam):
    """One fused ``cupy.ElementwiseKernel``, launched for each tensor."""

    def __init__(self, data: Data) -> None:
        import cupy

        super().__init__(data)
        self.m = {name: cupy.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: cupy.zeros_like(p) for name, p in self.params.items()}
        self.t = 0
        self.kernel = cupy.ElementwiseKernel(
            "T g, T lr_t, T rest1, T rest2, T eps",
            "T p, T m, T v",
            "m += rest1 * (g - m); v += rest2 * (g * g - v); p -= lr_t * m / (sqrt(v) + eps);",
            "adam",
        )

    def step(self) -> None:
        lr, beta1, beta2, eps = ADAM.values()
        self.t += 1
        lr_t = lr * math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        numbers = [np.float32(x) for x in (lr_t, 1 - beta1, 1 - beta2, eps)]
        grads = self.next_grads()
        for name, p in self.params.items():
            self.kernel(grads[name], *numbers, p, self.m[name], self.v[name])

    def graph(self, steps: int) -> Launch:
        return captured(self.step, steps)  # with numbers that stay as they are


def as_torch(array: Any) -> Any:
    """A tensor in the memory of a CuPy array."""
    import torch

    return torch.as_tensor(array, device="cuda")


class Torch(Adam):
    """``torch.optim.Adam``, with ``fused=True`` or ``foreach=True``."""

    corrected_eps = True
    options: ClassVar[Mapping[str, Any]] = {"fused": True}

    def __init__(self, data: Data) -> None:
        import torch

        super().__init__(data)
        self.tensors = [as_torch(p).requires_grad_() for p in self.params.values()]
        for tensor, g in zip(self.tensors, data.grads[0], strict=True):
            tensor.grad = as_torch(g.copy() if self.clips else g)
        betas = (ADAM["beta1"], ADAM["beta2"])
        self.optimizer = torch.optim.Adam(self.tensors, ADAM["lr"], betas, ADAM["eps"], **self.options)

    def step(self) -> None:
        self.optimizer.step()

    def graph(self, steps: int) -> Launch:
        raise NotCaptured("as a graph it is the contender 'torch fused, graph'")

    @classmethod
    def missing(cls) -> str:
        return no_torch()


class TorchForeach(Torch):
    options: ClassVar = {"foreach": True}


class TorchGraph(Torch):
    """A captured step, replayed."""

    options: ClassVar = {"fused": True, "capturable": True}

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.taken = 0

    def step(self) -> None:
        self.taken += 1
        if self.taken == 1:  # allocates
            super().step()
            return
        self.step = self.graph(1)  # type: ignore[method-assign]
        self.step()

    def graph(self, steps: int) -> Launch:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(steps):
                self.optimizer.step()
        return graph.replay


class TorchClipped(Torch):
    traffic = 32
    clips = True

    def step(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.tensors, CLIP, foreach=True)
        self.optimizer.step()


# --- what memory can do


class Copy(Contender):
    """A copy from one array to another, of all tensors' size."""

    def __init__(self, data: Any) -> None:
        import cupy

        size = sum(p.size for p in data.start)
        self.source, self.target = random_array(size, 0), cupy.empty(size, np.float32)

    def step(self) -> None:
        import cupy

        cupy.copyto(self.target, self.source)

    def check(self) -> None:
        self.step()
        np.testing.assert_array_equal(ends(self.target), ends(self.source))

    def graph(self, steps: int) -> Launch:
        return captured(self.step, steps)


CONTENDERS: dict[str, type[Any]] = {
    "xpoptim": Xpoptim,
    "xpoptim, graph": XpoptimGraph,
    "torch fused": Torch,
    "torch fused, graph": TorchGraph,
    "torch foreach": TorchForeach,
    "CuPy kernel": CupyKernel,
    "CuPy code": CupyCode,
    "copy": Copy,
    "xpoptim, clip_norm": XpoptimClipped,
    "torch fused, clip": TorchClipped,
}
