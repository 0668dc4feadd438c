"""This package against another commit of it, or against itself without its extension, in one process::

    python benchmarks/compare.py --against COMMIT
    python benchmarks/compare.py --without-extension

Both are imported, the other one under another name, and take turns in blocks of steps, so that slow drifts of the
machine meet both. The ratio of each round's medians is new to old. Rounds are added until the 95 % interval of the
median ratio, by order statistics, is narrower than `WIDTH`, or `MOST` were made.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from math import ceil, floor, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
WIDTH, FIRST, MOST = 0.1, 40, 400
Arrays = dict[str, np.ndarray]


def flat(tensors: int, elements: int) -> Arrays:
    return {f"W{i}": np.full(elements, 0.5, np.float32) for i in range(tensors)}


def nested(tensors: int, elements: int) -> dict[str, Arrays]:
    return {"a": flat(tensors, elements), "b": flat(tensors, elements)}


# What is stepped: the optimizer, the parameters, and steps in a block.
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], int]] = {
    "Adam, 100 × 1,000": (lambda xo: xo.Adam(), lambda: flat(100, 1_000), 40),
    "Adam, 1,000 × 100": (lambda xo: xo.Adam(), lambda: flat(1_000, 100), 20),
    "Adam, 10 × 100,000": (lambda xo: xo.Adam(), lambda: flat(10, 100_000), 20),
    "Adam, 4 × 4,000,000": (lambda xo: xo.Adam(), lambda: flat(4, 4_000_000), 3),
    "Adam, 3 × 100": (lambda xo: xo.Adam(), lambda: flat(3, 100), 400),
    "Adam, a list of 3 × 100": (lambda xo: xo.Adam(), lambda: list(flat(3, 100).values()), 400),
    "Adam, one array of 100": (lambda xo: xo.Adam(), lambda: np.full(100, 0.5, np.float32), 400),
    "Adam, nested, 20 × 100": (lambda xo: xo.Adam(), lambda: nested(10, 100), 200),
    "Adam with a schedule, 3 × 100": (lambda xo: xo.Adam(lr=lambda step: 1e-3), lambda: flat(3, 100), 400),
    "Adam with clip_norm, 10 × 1,000": (lambda xo: xo.Adam(clip_norm=1.0), lambda: flat(10, 1_000), 200),
    "Momentum, two floats": (lambda xo: xo.Momentum(), lambda: {"x": 1.0, "y": 2.0}, 400),
    "Adam, float64 in columns, 4 × 10,000": (
        lambda xo: xo.Adam(clip_norm=1.0),
        lambda: {f"W{i}": np.ones((100, 100), order="F") for i in range(4)},
        100,
    ),
}
APART = {"Adam by apply, 3 × 100": (lambda xo: xo.Adam(), lambda: flat(3, 100), 50)}
DROPOUTS = {"Dropout, 100 × 50": ((100, 50), 100), "Dropout, 1,000 × 1,000": ((1_000, 1_000), 5)}


def load(commit: str, folder: str) -> Any:
    """The package as it was at a commit, installed for itself and imported under the name ``xpoptim_before``."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    source, target = Path(folder) / "source", Path(folder) / "installed"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(source, filter="data")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(pip, check=True)
    return imported("xpoptim_before", target / "xpoptim")


def without_extension(folder: str) -> Any:
    """A copy of this package that has none, under the name ``xpoptim_without``."""
    import xpoptim

    target = Path(folder) / "xpoptim"
    shutil.copytree(Path(xpoptim.__file__).parent, target, ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
    return imported("xpoptim_without", target)


def imported(name: str, package: Path) -> Any:
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def fresh(tree: Any) -> Any:
    """Gradients like the parameters, in newly made arrays and under the same keys."""
    if isinstance(tree, dict):
        return {key: fresh(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fresh(value) for value in tree]
    return tree * 0.1 if isinstance(tree, float) else np.full_like(tree, 0.01)


def stepping(xo: Any, make: Callable[[Any], Any], params: Any) -> Callable[[], float]:
    """A function that makes a step and says how long it took, in microseconds."""
    opt = make(xo)

    def step() -> float:
        grads = fresh(params)
        start = time.perf_counter()
        opt.update(params, grads)
        return (time.perf_counter() - start) * 1e6

    return step


def applying(xo: Any, make: Callable[[Any], Any], params: Any) -> Callable[[], float]:
    opt, grads = make(xo), fresh(params)
    state = opt.init(params)

    def step() -> float:
        start = time.perf_counter()
        opt.apply(params, grads, state)
        return (time.perf_counter() - start) * 1e6

    return step


def dropping(xo: Any, shape: tuple[int, ...]) -> Callable[[], float]:
    drop, x = xo.Dropout(0.5, seed=1), np.ones(shape, np.float32)

    def step() -> float:
        start = time.perf_counter()
        drop.forward(x)
        drop.backward(x)
        return (time.perf_counter() - start) * 1e6

    return step


def paired(old: Callable[[], float], new: Callable[[], float], steps: int) -> dict[str, float]:
    """Medians of both in microseconds, the median ratio of the rounds, and its interval."""
    times: dict[str, list[float]] = {"old": [], "new": []}
    for run in (old, new) * 3:
        for _ in range(steps):
            run()
    ratios: list[float] = []
    low, high = 0.0, float("inf")
    while len(ratios) < FIRST or (high - low >= WIDTH and len(ratios) < MOST):
        order = (("old", old), ("new", new))
        blocks = {name: block(run, steps) for name, run in (order if len(ratios) % 2 else order[::-1])}
        for name, taken in blocks.items():
            times[name].append(taken)
        ratios.append(blocks["new"] / blocks["old"])
        low, high = interval(ratios)
    return {
        "old_us": median(times["old"]),
        "new_us": median(times["new"]),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "rounds": len(ratios),
    }


def block(run: Callable[[], float], steps: int) -> float:
    gc.disable()
    try:
        run()
        return median(run() for _ in range(steps))
    finally:
        gc.enable()


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, by order statistics."""
    n, values = len(values), sorted(values)
    reach = 1.96 * sqrt(n) / 2
    return values[max(0, floor(n / 2 - reach))], values[min(n - 1, ceil(n / 2 + reach))]


def against(commit: str | None, threads: int, only: str = "") -> dict[str, dict[str, float]]:
    """Every case whose name has ``only`` in it: this package as the new one, and as the old one that at the commit.

    If it is None, this package is the old one, and that without the extension the new one.
    """
    import xpoptim as here

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        old, new = (load(commit, folder), here) if commit else (here, without_extension(folder))
        for xo in (old, new):
            xo.set_num_threads(threads)
        for cases, timed in ((CASES, stepping), (APART, applying)):
            for name, (make, params, steps) in cases.items():
                if only not in name:
                    continue
                found[name] = paired(timed(old, make, params()), timed(new, make, params()), steps)
                print(spelled(name, found[name]), flush=True)
        for name, (shape, steps) in DROPOUTS.items():
            if only not in name:
                continue
            found[name] = paired(dropping(old, shape), dropping(new, shape), steps)
            print(spelled(name, found[name]), flush=True)
    return found


def spelled(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name:38} {figures['old_us']:10.2f} us {figures['new_us']:10.2f} us   "
        f"ratio {figures['ratio']:.3f} ({figures['low']:.3f} to {figures['high']:.3f}, {figures['rounds']:.0f} rounds)"
    )
