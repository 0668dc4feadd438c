"""Steps on a GPU, emulated or real, next to the same steps in NumPy; every bit is compared."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
from helpers import assert_same_tree, frozen_values, random_values

import xpoptim as xo
from xpoptim.engines.cuda import driver

Tree = dict[str, np.ndarray]


class Graph:
    """A step that was captured."""

    def __init__(self) -> None:
        self.names: list[str] = []  # its kernels and copies
        self.made: Any = None  # CuPy's graph

    def launch(self, stream: Any = None) -> None:
        self.made.launch(stream)


class GPU(list[str]):
    """The list of the kernels launched and copies made so far, and what else a test asks of a GPU.

    CuPy itself serves for the rest: devices, streams, events.
    """

    stream: Any  # the current one of device 0, which is not the default one

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[int] = []  # of each launch
        self._graph: Graph | None = None

    @property
    def device(self) -> int:
        """The current one."""
        import cupy

        return cupy.cuda.Device().id

    def take(self) -> list[str]:
        """What was launched since the last call."""
        names = list(self)
        self.clear()
        self.devices.clear()
        return names

    def array(self, values: Any, offset: int = 0, device: int = 0) -> Any:
        """A CuPy array with the values, strides and all, ``offset`` bytes beyond a multiple of 512.

        They are there for every stream. The memory is that of the current stream: who uses the array on another keeps
        it until that is done.
        """
        raise NotImplementedError

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy of a CuPy array's values, when all work on all devices is done."""
        raise NotImplementedError

    def fill(self, array: Any, values: Any) -> None:
        """Write values into an array, where it is, on the current stream of its device."""
        raise NotImplementedError

    def busy(self, stream: Any) -> Any:
        """Give a stream something long to do; the event after it, which is not reached while nobody waits for it."""
        raise NotImplementedError

    def quiet(self) -> AbstractContextManager[None]:
        """Refuse every allocation, and all that waits for the GPU or copies between it and the host."""
        raise NotImplementedError

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record launches instead of carrying them out. Whatever allocates or waits is refused."""
        import cupy

        self._graph = graph = Graph()
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        try:
            with self.quiet():
                yield graph
        finally:
            graph.made = stream.end_capture()
            self._graph = None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep a record of what the engine launches and copies."""
        launch, copy = driver.launch, driver.copy

        def launched(function: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
            self._record(function.name)
            launch(function, grid, block, arguments)

        def copied(to: Any, source: Any) -> None:
            self._record("copy", to.data.device_id)
            copy(to, source)

        with mock.patch.multiple(driver, launch=launched, copy=copied):
            yield

    def _record(self, name: str, device: int | None = None) -> None:
        if self._graph is not None:
            self._graph.names.append(name)
        else:
            self.append(name)
            self.devices.append(self.device if device is None else device)

    def host(self, tree: Any) -> Any:
        """Nested containers of arrays with NumPy arrays instead."""
        if isinstance(tree, dict):
            return {key: self.host(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.host(value) for value in tree]
        return tree if isinstance(tree, np.ndarray | np.generic | int | float | str | None) else self.to_numpy(tree)


Place = Callable[[GPU, np.ndarray, int], Any]


def plain(gpu: GPU, values: np.ndarray, number: int) -> Any:
    return gpu.array(values)


def askew(gpu: GPU, values: np.ndarray, number: int) -> Any:
    """Some arrays on 16 bytes, some not."""
    return gpu.array(values, number % 3 * values.itemsize)


def moved(gpu: GPU, tree: Tree, place: Place = plain) -> dict[str, Any]:
    """The arrays on the GPU."""
    return {key: place(gpu, values, number) for number, (key, values) in enumerate(tree.items())}


def assert_same(gpu: GPU, opt: xo.Optimizer, params: Any, expected_opt: xo.Optimizer, expected: Any) -> None:
    assert_same_tree(gpu.host(params), expected, "params")
    assert_same_tree(gpu.host(opt.state), expected_opt.state, "state")


def frozen_on(gpu: GPU, *trees: Any) -> Any:
    """An immutable picture of the values."""
    return tuple(frozen_values(gpu.host(tree)) for tree in trees)


# No elements, no axes, fewer than a vector, a vector and a tail, some chunks and a tail.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (5,), (3, 0, 2), (7, 9), (4099,))


def trees(
    dtypes: dict[str, np.dtype], shapes: tuple[tuple[int, ...], ...] = SHAPES, *, seed: int = 0, special: float = 0.2
) -> Tree:
    """An array for each dtype and shape, with special values among the others."""
    rng = np.random.default_rng(seed)
    return {
        f"{name} {shape}": random_values(rng, shape, dtype, special)
        for name, dtype in dtypes.items()
        for shape in shapes
    }


def alike(params: Tree, *, seed: int, special: float = 0.2, dtype: np.dtype | None = None) -> Tree:
    """Gradients for parameters."""
    rng = np.random.default_rng(seed)
    return {key: random_values(rng, p.shape, dtype or p.dtype, special) for key, p in params.items()}


def follow(
    gpu: GPU,
    make: Callable[[], xo.Optimizer],
    params: Tree,
    gradients: list[Tree],
    *,
    place: Place = plain,
    place_gradient: Place = askew,
    before: Callable[[xo.Optimizer, int], None] = lambda opt, step: None,
) -> None:
    """Steps on the GPU and in NumPy, compared after each."""
    opt, expected_opt, on_gpu = make(), make(), moved(gpu, params, place)
    expected = {key: p.copy() for key, p in params.items()}
    for step, grads in enumerate(gradients):
        before(opt, step)
        before(expected_opt, step)
        opt.update(on_gpu, moved(gpu, grads, place_gradient))
        expected_opt.update(expected, grads)
        assert_same(gpu, opt, on_gpu, expected_opt, expected)


def capture_and_replay(
    gpu: GPU, make: Callable[[], xo.Optimizer], params: Tree, *, lay: Callable[[np.ndarray], np.ndarray] = np.copy
) -> None:
    """Ordinary steps, a capture, replays, and ordinary steps between replays."""
    opt, expected_opt, expected = make(), make(), {key: p.copy() for key, p in params.items()}
    on_gpu = moved(gpu, params, lambda gpu, p, _: gpu.array(lay(p)))
    buffers = moved(gpu, params, lambda gpu, p, _: gpu.array(lay(p)))  # gradients, always in the same place
    gradients = (alike(params, seed=step, special=0) for step in itertools.count())

    def fill(grads: Tree) -> None:
        for key, g in grads.items():
            gpu.fill(buffers[key], g)

    def ordinary(*, elsewhere: bool) -> None:
        grads = next(gradients)
        fill(grads)
        opt.update(on_gpu, moved(gpu, grads, lambda gpu, g, _: gpu.array(lay(g), 16)) if elsewhere else buffers)
        expected_opt.update(expected, grads)
        assert_same(gpu, opt, on_gpu, expected_opt, expected)

    def replay() -> None:
        grads = next(gradients)
        fill(grads)
        with gpu.quiet():
            opt.prepare_replay()
            graph.launch()
        expected_opt.update(expected, grads)

    ordinary(elsewhere=True)
    ordinary(elsewhere=False)
    gpu.take()
    before = frozen_on(gpu, on_gpu, opt.state)
    with gpu.capture() as graph:
        opt.update(on_gpu, buffers)
    assert gpu == []  # recorded, not run
    assert "prologue" in graph.names
    assert frozen_on(gpu, on_gpu, opt.state) == before
    for _ in range(3):
        replay()
    assert_same(gpu, opt, on_gpu, expected_opt, expected)
    ordinary(elsewhere=True)
    replay()
    opt.lr = expected_opt.lr = 0.005
    replay()
    ordinary(elsewhere=False)
    replay()
    assert_same(gpu, opt, on_gpu, expected_opt, expected)
