"""Time Dropout on the CPU against plain NumPy and torch, side by side in one process: ``python benchmarks/dropout.py``.

The plain code is that of the book, K. Saito's *Deep Learning from Scratch*::

    mask = np.random.rand(*x.shape) > ratio
    y = x * mask
    dx = dout * mask

What is done so that the comparison is fair:

* Contenders take turns, a block of steps each, in an order that moves on by one each round, so that slow drifts of
  the machine meet all of them. A ratio is taken within each round; the median of the rounds' ratios is reported.
* A block begins with a pause, in which threads that spin after the block before (those of torch's OpenMP do) go to
  sleep, and with steps that are not counted, in which CPUs and threads wake up again.
* Results go to newly allocated arrays, as the layers of a network have it, and are freed outside of the measured
  time. ``out=`` writes to arrays that are there already.
* The number of threads is that of xpoptim and of torch alike; the plain code has one in any case. The garbage
  collector is off while a step is timed.
* Before anything is timed, xpoptim's fused result is compared with its reference's to the last bit, and each
  contender's share of zeros with the ratio; and its backward must have the zeros of its forward.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers

import xpoptim as xo
from xpoptim.demo.info import cpu_name

SIZE = 4_000_000  # float32 elements
RATIO = 0.5
PAUSE = 0.05  # seconds
UNCOUNTED = 5  # steps at the start of a block


class Plain:
    """The book's code."""

    needs: tuple[str, ...] = ()

    def __init__(self, x: np.ndarray, dout: np.ndarray) -> None:
        self.x, self.dout = x, dout
        self.mask = np.ones(0, bool)

    def forward(self) -> Any:
        self.mask = np.random.rand(*self.x.shape) > RATIO  # noqa: NPY002
        return self.x * self.mask

    def backward(self, y: Any) -> Any:
        return self.dout * self.mask


class Fused:
    """xpoptim as a user calls it."""

    needs: tuple[str, ...] = ()

    def __init__(self, x: np.ndarray, dout: np.ndarray) -> None:
        self.x, self.dout = x, dout
        self.drop = xo.Dropout(RATIO, seed=1)

    def forward(self) -> Any:
        return self.drop.forward(self.x)

    def backward(self, y: Any) -> Any:
        return self.drop.backward(self.dout)


class FusedOut(Fused):
    """The same with results in arrays that are there already."""

    def __init__(self, x: np.ndarray, dout: np.ndarray) -> None:
        super().__init__(x, dout)
        self.y, self.dx = np.ones_like(x), np.ones_like(x)

    def forward(self) -> Any:
        return self.drop.forward(self.x, out=self.y)

    def backward(self, y: Any) -> Any:
        return self.drop.backward(self.dout, out=self.dx)


class Torch:
    """``torch.nn.functional.dropout``, which scales in training, and autograd."""

    needs = ("torch",)

    def __init__(self, x: np.ndarray, dout: np.ndarray) -> None:
        import torch

        self.function = torch.nn.functional.dropout
        self.x, self.dout = torch.from_numpy(x).clone().requires_grad_(), torch.from_numpy(dout).clone()

    def forward(self) -> Any:
        self.x.grad = None
        return self.function(self.x, RATIO, training=True)

    def backward(self, y: Any) -> Any:
        y.backward(self.dout)
        return self.x.grad


CONTENDERS: dict[str, Any] = {"xpoptim": Fused, "xpoptim, out=": FusedOut, "NumPy": Plain, "torch": Torch}
STEPS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda one: one.forward(),
    "forward + backward": lambda one: (y := one.forward(), one.backward(y)),
}


def arrays(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An activation and the gradient of its dropout: standard normal float32, not zero anywhere."""
    rng = np.random.default_rng(0)
    x, dout = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
    return np.where(x == 0, np.float32(1), x), np.where(dout == 0, np.float32(1), dout)


def missing(name: str) -> str:
    """Why a contender cannot run here, or an empty string."""
    lacking = [module for module in CONTENDERS[name].needs if find_spec(module) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else ""


def check(name: str, x: np.ndarray, dout: np.ndarray) -> None:
    """Raise AssertionError unless the contender is a dropout of this ratio with one mask for forward and backward."""
    one = CONTENDERS[name](x, dout)
    y = one.forward()
    dx = one.backward(y)
    y, dx = (a.detach().numpy() if hasattr(a, "detach") else a for a in (y, dx))
    dropped = y == 0
    assert abs(float(dropped.mean()) - RATIO) < 5 * (RATIO * (1 - RATIO) / x.size) ** 0.5, name
    np.testing.assert_array_equal(dx == 0, dropped, name)
    scale = 1 if isinstance(one, Plain | Fused) else 1 / (1 - RATIO)
    np.testing.assert_array_equal(y[~dropped], (x * np.float32(scale))[~dropped], name)
    if isinstance(one, Fused):
        with xo.engine("reference"):
            np.testing.assert_array_equal(xo.Dropout(RATIO, seed=1).forward(x), y, name)


def kept_bytes(name: str, x: np.ndarray, dout: np.ndarray) -> float:
    """Bytes an element that a contender of NumPy arrays holds between forward and backward, beside the result."""
    one = CONTENDERS[name](x, dout)
    tracemalloc.start()
    try:
        y = one.forward()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    new = 0 if isinstance(one, FusedOut) else y.nbytes
    return round((held - new) / x.size, 3)


def block(one: Any, step: Callable[[Any], Any], steps: int) -> list[float]:
    """The times of so many steps in milliseconds."""
    time.sleep(PAUSE)
    times = []
    for _ in range(UNCOUNTED + steps):
        start = time.perf_counter()
        result = step(one)
        times.append((time.perf_counter() - start) * 1e3)
        del result
    return times[UNCOUNTED:]


def compare(names: list[str], what: str, x: np.ndarray, dout: np.ndarray, rounds: int, steps: int) -> dict[str, Any]:
    """Median and minimum of each contender's step, and the median over the rounds of its ratio to xpoptim's."""
    contenders = {name: CONTENDERS[name](x, dout) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(block(contenders[name], STEPS[what], steps))
    finally:
        gc.enable()
    own = [median(one) for one in times["xpoptim"]]
    return {
        name: {
            "median_ms": median(t for one in blocks for t in one),
            "min_ms": min(t for one in blocks for t in one),
            "ratio": median(median(one) / reference for one, reference in zip(blocks, own, strict=True)),
        }
        for name, blocks in times.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The report


def circumstances() -> dict[str, Any]:
    """Date, machine, versions and load."""
    versions = {"python": platform.python_version(), "xpoptim": xo.__version__}
    for name in ("numpy", "llvmlite", "torch"):
        versions[name] = metadata.version(name) if find_spec(name) else "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_at_start": os.getloadavg()[0],
        "elements": SIZE,
        "versions": versions,
    }


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, info = Console(), report["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    console.print(f"{info['cpu']}, load {info['load_at_start']:.2f}; {versions}")
    table = Table(title=f"Dropout({RATIO}), {SIZE:,} float32: median ms, times xpoptim's")
    table.add_column("")
    for key in report["steps"]:
        count, what = key.split(", ")
        table.add_column(f"{what}, {count} thread{'s' * (count != '1')}", justify="right")
    for name in report["names"]:
        cells = (found[name] for found in report["steps"].values())
        table.add_row(name, *(f"{x['median_ms']:.3g}  {x['ratio']:.3g}×" for x in cells))
    console.print(table)
    kept = ", ".join(f"{name} {held:g}" for name, held in report["kept_bytes_per_element"].items())
    console.print(f"bytes an element kept from forward to backward: {kept}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=7, help="steps of a block")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders and xpoptim")
    asked = parser.parse_args()
    names = ["xpoptim", *(name for name in asked.only or CONTENDERS if name != "xpoptim")]
    for name in [name for name in names if missing(name)]:
        print(f"without {name}: {missing(name)}")
        names.remove(name)
    x, dout = arrays()
    report: dict[str, Any] = {"circumstances": circumstances(), "names": names, "steps": {}}
    for name in names:
        check(name, x, dout)
    report["kept_bytes_per_element"] = {name: kept_bytes(name, x, dout) for name in names if not CONTENDERS[name].needs}
    for count in asked.threads:
        peers.set_threads(count)
        for what in STEPS:
            found = compare(names, what, x, dout, asked.rounds, asked.steps)
            report["steps"][f"{count}, {what}"] = found
    report["circumstances"]["load_at_end"] = os.getloadavg()[0]
    show(report)
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
