"""What the demo trains: the digits, once per optimizer, and with and without Dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

import xpoptim as xo

from ..engines.choose import Choice
from . import DemoError, one_line, plain
from .network import Array, Network

_R = TypeVar("_R")

BATCH = 100
TRAIN_IMAGES = 1437  # four fifths of the 1,797
SIZES = (64, 256, 128, 64, 10)
SIZES_SHOWN = "-".join(map(str, SIZES))
DROPOUT_RATIO = 0.2

# For the Dropout picture: few images, and one label in five is wrong, so that there is something to overfit.
SMALL_IMAGES = 300
WRONG_LABELS = 60
STRONG_RATIO = 0.5

POINTS = 40  # measurements along each training curve


@dataclass(frozen=True)
class Backend:
    """An array namespace, and how to wait until its device has finished."""

    name: str
    xp: ModuleType
    synchronize: Callable[[], None]


def open_backend(name: str) -> Backend:
    """The backend ``"numpy"`` or ``"cupy"``; DemoError if CuPy or a GPU is missing."""
    if name == "numpy":
        return Backend("numpy", np, lambda: None)
    try:
        import cupy
    except Exception as error:  # CuPy's import raises more than ImportError when its libraries do not fit
        raise DemoError(
            f"--backend cupy needs CuPy ({one_line(error)}): install with  pip install '.[cuda13]'  "
            "(or cuda12) in xpoptim's source folder, or take --backend numpy"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
        if devices == 0:
            raise RuntimeError("CUDA finds none")
    except Exception as error:
        raise DemoError(
            f"--backend cupy needs an NVIDIA GPU and its driver ({one_line(error)}): take --backend numpy"
        ) from error
    return Backend("cupy", cupy, lambda: cupy.cuda.get_current_stream().synchronize())


@dataclass(frozen=True)
class Data:
    """Images (rows of 64 pixels from 0 to 1, float32) and labels, split into training and test."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


def load_digits(xp: ModuleType, seed: int, train_images: int = TRAIN_IMAGES, wrong_labels: int = 0) -> Data:
    """The 1,797 digits of scikit-learn in random order; the first `train_images` are for training.

    The first `wrong_labels` training images are given another digit's label; test labels stay right.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    images, labels = (pixels[order] / 16).astype(np.float32), labels[order]
    labels[:wrong_labels] = (labels[:wrong_labels] + rng.integers(1, 10, wrong_labels)) % 10
    images, labels = xp.asarray(images), xp.asarray(labels)
    n = train_images
    return Data(images[:n], labels[:n], images[n:], labels[n:])


@dataclass(frozen=True)
class Entry:
    """One optimizer of the comparison: the fused one, and the plain one to time it against."""

    name: str
    lr: float
    make: Callable[[float], xo.Optimizer]
    make_plain: Callable[[float, ModuleType], Any]


# Learning rates that suit each optimizer on networks of about this size; the table shows them.
ENTRIES = (
    Entry("SGD", 0.3, lambda lr: xo.SGD(lr=lr), lambda lr, xp: plain.PlainSGD(lr)),
    Entry("Momentum", 0.05, lambda lr: xo.Momentum(lr=lr), lambda lr, xp: plain.PlainMomentum(lr)),
    Entry("Nesterov", 0.05, lambda lr: xo.Nesterov(lr=lr), lambda lr, xp: plain.PlainNesterov(lr)),
    Entry("AdaGrad", 0.03, lambda lr: xo.AdaGrad(lr=lr), lambda lr, xp: plain.PlainAdaGrad(lr, xp)),
    Entry("RMSprop", 0.002, lambda lr: xo.RMSprop(lr=lr), lambda lr, xp: plain.PlainRMSprop(lr, xp)),
    Entry("Adam", 0.003, lambda lr: xo.Adam(lr=lr), lambda lr, xp: plain.PlainAdam(lr, xp)),
    Entry("AdamW", 0.003, lambda lr: xo.AdamW(lr=lr), lambda lr, xp: plain.PlainAdamW(lr, xp)),
)


@dataclass
class Curve:
    """Measurements along one training, each by the network without dropping anything."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def measure(self, step: int, network: Network, data: Data) -> None:
        self.steps.append(step)
        self.loss.append(float(network.loss(data.x_train, data.y_train)))
        self.train_accuracy.append(network.accuracy(data.x_train, data.y_train))
        self.test_accuracy.append(network.accuracy(data.x_test, data.y_test))


@dataclass
class Result:
    """One optimizer's training: its curve, and seconds of every step by part."""

    name: str
    lr: float
    curve: Curve = field(default_factory=Curve)
    gradient_seconds: list[float] = field(default_factory=list)
    fused_seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    parameters: int = 0
    arrays: int = 0
    difference: float = 0.0  # largest between the parameters of the fused and the plain optimizer, at the end

    @property
    def steps_per_second(self) -> float:
        """Forward, backward and fused update; without the plain update and the measurements."""
        return len(self.fused_seconds) / (sum(self.gradient_seconds) + sum(self.fused_seconds))


OnStep = Callable[[int, Curve], None]


def batches(images: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the mini-batch of each step; every pass over the images has an order of its own.

    Images left over at the end of a pass are skipped.
    """
    rng = np.random.default_rng([seed, 1])
    order = np.arange(0)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(images)
        yield order[:BATCH]
        order = order[BATCH:]


def measured_steps(steps: int, *, logarithmic: bool) -> set[int]:
    """The steps after which the curves are measured: at most `POINTS`, the first and the last among them."""
    space = np.geomspace if logarithmic else np.linspace
    return {round(float(step)) for step in space(1, steps, min(steps, POINTS))}


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products on one thread: these are too small to share, and threads that wait would cost more."""
    threadpoolctl = import_module("threadpoolctl")  # scikit-learn needs it, so it is there
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@one_blas_thread()
def compare(backend: Backend, entry: Entry, data: Data, seed: int, steps: int, on_step: OnStep) -> Result:
    """Train the network with one optimizer, and time it against the plain one on the same gradients.

    In every step the gradients are computed once. The fused optimizer moves the network's parameters, the
    plain one a copy of them; which of the two goes first alternates, so that neither profits from what the
    other left in the caches.
    """
    xp, synchronize = backend.xp, backend.synchronize
    network = Network(SIZES, xp, seed=seed, dropout_ratio=DROPOUT_RATIO)
    plain_params = {key: value.copy() for key, value in network.params.items()}
    optimizer, plain_optimizer = entry.make(entry.lr), entry.make_plain(entry.lr, xp)
    # On NumPy insist on the fused engine, so that the table cannot call something else by that name.
    engine: Choice = "fused" if backend.name == "numpy" else "auto"
    result = Result(entry.name, entry.lr)
    result.arrays, result.parameters = len(plain_params), sum(value.size for value in plain_params.values())
    measured = measured_steps(steps, logarithmic=True)

    def timed(function: Callable[..., _R], *args: object) -> tuple[float, _R]:
        synchronize()
        start = perf_counter()
        value = function(*args)
        synchronize()
        return perf_counter() - start, value

    def plain_update() -> None:
        result.plain_seconds.append(timed(plain_optimizer.update, plain_params, grads)[0])

    for step, chosen in enumerate(batches(len(data.y_train), steps, seed), start=1):
        batch = xp.asarray(chosen)
        took, grads = timed(network.gradient, data.x_train[batch], data.y_train[batch])
        result.gradient_seconds.append(took)
        if step % 2:
            plain_update()
        with xo.engine(engine):
            result.fused_seconds.append(timed(optimizer.update, network.params, grads)[0])
        if step % 2 == 0:
            plain_update()
        if step in measured:
            result.curve.measure(step, network, data)
        on_step(step, result.curve)
    result.difference = max(float(abs(network.params[key] - plain_params[key]).max()) for key in network.params)
    return result


@one_blas_thread()
def overfit(backend: Backend, dropout_ratio: float, seed: int, steps: int, on_step: OnStep) -> Curve:
    """Train the network on a few images, some of them with a wrong label; for the Dropout picture."""
    data = load_digits(backend.xp, seed, SMALL_IMAGES, WRONG_LABELS)
    network = Network(SIZES, backend.xp, seed=seed, dropout_ratio=dropout_ratio)
    optimizer = xo.Adam()
    curve = Curve()
    measured = measured_steps(steps, logarithmic=False)
    for step, chosen in enumerate(batches(SMALL_IMAGES, steps, seed), start=1):
        batch = backend.xp.asarray(chosen)
        optimizer.update(network.params, network.gradient(data.x_train[batch], data.y_train[batch]))
        if step in measured:
            curve.measure(step, network, data)
        on_step(step, curve)
    return curve
