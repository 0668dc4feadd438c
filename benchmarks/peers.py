"""The contenders: one small class each, with the same three calls.

``hand_over`` gives the contender new gradients, in arrays just allocated and written, as backpropagation leaves
them; it is never timed. ``step`` is one optimizer step, and what is timed. ``params`` gives the parameters as NumPy
arrays. Every contender has float32 parameters of its own; `check` compares its first steps with the textbook formulas.
"""

from __future__ import annotations

import math
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

import xpoptim as xo
from xpoptim.demo import plain

SIZES = [(100, 1_000), (1_000, 100), (10, 100_000), (4, 4_000_000)]  # tensors × elements
LR = 0.01  # of the other rules
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7}

Arrays = list[np.ndarray]


def arrays(size: tuple[int, int], seed: int) -> Arrays:
    """Standard normal float32 arrays: the parameters to start from, or gradients."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size[1], dtype=np.float32) for _ in range(size[0])]


class Contender:
    """A dict of NumPy arrays and an optimizer with the book's ``update(params, grads)``."""

    needs: tuple[str, ...] = ()  # modules
    corrected_eps = False  # whether Adam's eps is added to the corrected root, as in torch and optax

    def __init__(self, start: Arrays, optimizer: Any) -> None:
        self._params = {f"W{i}": p.copy() for i, p in enumerate(start)}
        self._grads: dict[str, np.ndarray] = {}
        self.optimizer = optimizer

    def hand_over(self, grads: Arrays) -> None:
        # The former arrays live until these are made, so that no array is where its predecessor was.
        self._grads = {name: g.copy() for name, g in zip(self._params, grads, strict=True)}

    def step(self) -> None:
        self.optimizer.update(self._params, self._grads)

    def params(self) -> Arrays:
        return list(self._params.values())


class Plain(Contender):
    """The formulas as plain NumPy code, temporaries and all: the same that xpoptim's demo compares with.

    Its scalars are Python floats, so that its temporaries stay float32; `Book` does without that care.
    """

    def __init__(self, start: Arrays, rule: str = "Adam") -> None:
        super().__init__(start, textbook(rule))


def textbook(rule: str) -> Any:
    if rule == "Adam":
        return plain.PlainAdam(xp=np, **ADAM)
    kind = getattr(plain, f"Plain{rule}")
    return kind(LR, np) if rule in ("AdaGrad", "RMSprop") else kind(LR)


class Book(Contender):
    """Adam as the textbook spells it: np.sqrt makes lr_t a float64 scalar, which NumPy 2 widens temporaries to."""

    def __init__(self, start: Arrays) -> None:
        super().__init__(start, self)
        self._t = 0
        self._m = {name: np.zeros_like(p) for name, p in self._params.items()}
        self._v = {name: np.zeros_like(p) for name, p in self._params.items()}

    def update(self, params: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> None:
        lr, beta1, beta2, eps = ADAM.values()
        self._t += 1
        lr_t = lr * np.sqrt(1.0 - beta2**self._t) / (1.0 - beta1**self._t)
        for name in params:
            self._m[name] += (1 - beta1) * (grads[name] - self._m[name])
            self._v[name] += (1 - beta2) * (grads[name] ** 2 - self._v[name])
            params[name] -= lr_t * self._m[name] / (np.sqrt(self._v[name]) + eps)


class Fused(Contender):
    """xpoptim as a user calls it."""

    def __init__(self, start: Arrays, rule: str = "Adam") -> None:
        super().__init__(start, xo.Adam(**ADAM) if rule == "Adam" else getattr(xo, rule)(lr=LR))


class Reference(Fused):
    """xpoptim's reference engine: the same rule, each operation a NumPy call."""

    def step(self) -> None:
        with xo.engine("reference"):
            super().step()


class _Moves(xo.Optimizer):
    slots = ("m", "v")

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, m: Any, v: Any) -> Any:
        return p + g, v, m


class Traffic(Contender):
    """Adam's loads and stores with almost no arithmetic, traced and compiled by xpoptim itself.

    It reads p, g, m and v and writes p, m and v, 28 bytes an element as Adam does. A single addition gives the new p;
    m and v are exchanged. It shows what Adam's arithmetic costs on top of its memory traffic. It shares xpoptim's
    loops and threads, so it says nothing of what those cost.
    """

    def __init__(self, start: Arrays) -> None:
        super().__init__(start, _Moves())


class TorchFused:
    """``torch.optim.Adam(fused=True)`` on tensors in torch's own memory."""

    needs = ("torch",)
    corrected_eps = True
    kind = "fused"

    def __init__(self, start: Arrays) -> None:
        import torch

        self._from_numpy = torch.from_numpy
        self._params = [torch.from_numpy(p).clone().requires_grad_() for p in start]
        betas = (ADAM["beta1"], ADAM["beta2"])
        optimizer = torch.optim.Adam(self._params, ADAM["lr"], betas, ADAM["eps"], **{self.kind: True})
        self.step = optimizer.step

    def hand_over(self, grads: Arrays) -> None:
        for p, g in zip(self._params, grads, strict=True):
            p.grad = self._from_numpy(g).clone()

    def params(self) -> Arrays:
        return [p.detach().numpy() for p in self._params]


class TorchForeach(TorchFused):
    """``torch.optim.Adam(foreach=True)``."""

    kind = "foreach"


class TorchOnNumPy(TorchFused):
    """torch's fused Adam as the optimizer of a NumPy program: a step takes gradients that are NumPy arrays.

    That is what xpoptim does. `TorchFused` leaves to the untimed part what torch's backpropagation does for its own
    users: it finds its gradients in place.
    """

    def __init__(self, start: Arrays) -> None:
        super().__init__(start)
        self._optimizer_step = self.step
        self.step = self._step
        self._grads: Arrays = []

    def hand_over(self, grads: Arrays) -> None:
        self._grads = [g.copy() for g in grads]

    def _step(self) -> None:
        for p, g in zip(self._params, self._grads, strict=True):
            p.grad = self._from_numpy(g)
        self._optimizer_step()


class Optax:
    """``optax.adam`` under ``jax.jit`` with parameters and state donated; a step waits for its result."""

    needs = ("jax", "optax")
    corrected_eps = True

    def __init__(self, start: Arrays) -> None:
        import jax
        import optax

        optimizer = optax.adam(ADAM["lr"], b1=ADAM["beta1"], b2=ADAM["beta2"], eps=ADAM["eps"])

        def update(params: Any, grads: Any, state: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update, donate_argnums=(0, 2))
        self._array, self._wait = jax.numpy.array, jax.block_until_ready
        self._params = [self._array(p) for p in start]
        self._state = optimizer.init(self._params)
        self._grads: list[Any] = []

    def hand_over(self, grads: Arrays) -> None:
        self._grads = self._wait([self._array(g) for g in grads])

    def step(self) -> None:
        self._params, self._state = self._update(self._params, self._grads, self._state)
        self._wait((self._params, self._state))

    def params(self) -> Arrays:
        return [np.asarray(p) for p in self._params]


CONTENDERS: dict[str, Any] = {
    "xpoptim": Fused,
    "reference": Reference,
    "NumPy": Plain,
    "NumPy-book": Book,
    "traffic": Traffic,
    "torch-fused": TorchFused,
    "torch-numpy": TorchOnNumPy,
    "torch-foreach": TorchForeach,
    "optax": Optax,
}


def made(name: str, start: Arrays, rule: str = "Adam") -> Any:
    """A contender. Of rules other than Adam, only xpoptim's and the plain ones are there."""
    return CONTENDERS[name](start) if rule == "Adam" else CONTENDERS[name](start, rule)


def missing(name: str) -> str:
    """Why a contender cannot run here, or an empty string."""
    lacking = [module for module in CONTENDERS[name].needs if find_spec(module) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else ""


def versions() -> dict[str, str]:
    """The versions of all that takes part."""
    found = {"python": platform.python_version(), "xpoptim": xo.__version__}
    for name in ("numpy", "llvmlite", "torch", "jax", "optax"):
        found[name] = metadata.version(name) if find_spec(name) else "not installed"
    return found


def set_threads(count: int) -> None:
    """Bound the threads of xpoptim, and of torch where it is installed. (JAX takes every CPU of the process.)"""
    xo.set_num_threads(count)
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(count)


# ---------------------------------------------------------------------------------------------------------------------
# Correctness, before anything is timed


def check(name: str, size: tuple[int, int], rule: str = "Adam") -> None:
    """Compare a contender's first steps with the formulas in float64, and the fused engine's with the reference's bits.

    Raises ``AssertionError`` if they differ by more than float32 rounding does.
    """
    start, gradients = arrays(size, seed=0), [arrays(size, seed=k) for k in (1, 2, 3)]
    contender = made(name, start, rule)
    found = _after(contender, gradients)
    if name == "xpoptim":
        report = contender.optimizer.explain(contender._params, contender._grads)
        assert all(served.engine == "fused" for served in report), report
        for a, b in zip(found, _after(Reference(start, rule), gradients), strict=True):
            np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32), "fused and reference engine differ")
    for a, b in zip(found, _expected(type(contender), start, gradients, rule), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name)


def _after(contender: Any, gradients: list[Arrays]) -> Arrays:
    for grads in gradients:
        contender.hand_over(grads)
        contender.step()
    return contender.params()


def _expected(kind: Any, start: Arrays, gradients: list[Arrays], rule: str) -> Arrays:
    if kind is Traffic:
        return [sum((grads[i] for grads in gradients), start=p) for i, p in enumerate(start)]
    wide = [p.astype(np.float64) for p in start]
    optimizer = textbook(rule)
    for t, grads in enumerate(gradients, 1):
        if kind.corrected_eps:
            optimizer.eps = ADAM["eps"] * math.sqrt(1 - ADAM["beta2"] ** t)
        optimizer.update(dict(enumerate(wide)), {i: g.astype(np.float64) for i, g in enumerate(grads)})
    return wide
