"""Time one Adam step against others, side by side in one process: ``python benchmarks/compare.py``.

What is done so that the comparison is fair:

* Contenders take turns, a block each, in an order that moves on by one each round, so that slow drifts of the
  machine meet all of them. A ratio is taken within each round; the median of the rounds' ratios is reported.
* A block begins with a pause, in which threads that spin after the block before (those of torch's OpenMP do) go to
  sleep, and with steps that are not counted, until each contender's data, memory and threads are warm.
  No setting of torch's is changed: a spinning pool is fastest for torch itself.
* Every step gets gradients in newly allocated arrays, as after backpropagation, for all in the same way (`peers`).
  To make them is not timed, nor is to hang them on torch's parameters.
* All have the same number of threads; the process is bound to as many CPUs where the system can do that. The garbage
  collector is off while a step is timed.
* Before it is timed, every contender's first steps are compared with the formulas in float64, and xpoptim's fused
  engine with its reference, to the last bit.

The time of the first step of a new rule and that of ``import xpoptim`` are measured in fresh processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import peers
import versions

from xpoptim.demo.info import cpu_name

PAUSE = 0.05  # seconds; the OpenMP of torch spins for some milliseconds
# For each size: rounds, steps of a block that are not counted, steps that are.
BLOCKS = dict(zip(peers.SIZES, [(30, 10, 20), (20, 5, 10), (20, 10, 20), (12, 2, 4)], strict=True))
FRESH_PROCESSES = 15
# The reference engine is made to be right, not to be fast; and JAX, once loaded, scatters everyone's small arrays over
# the heap, so that it is compared in a process of its own: --only optax.
DEFAULT = [name for name in peers.CONTENDERS if name not in ("reference", "optax")]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def block(contender: Any, gradients: list[peers.Arrays], uncounted: int, counted: int) -> list[float]:
    """The times of the counted steps in milliseconds."""
    time.sleep(PAUSE)
    times = []
    for k in range(uncounted + counted):
        contender.hand_over(gradients[k % len(gradients)])
        start = time.perf_counter()
        contender.step()
        times.append((time.perf_counter() - start) * 1e3)
    return times[uncounted:]


def compare(size: tuple[int, int], names: list[str], rounds: int, *steps: int) -> dict[str, dict[str, float]]:
    """Median and minimum of each contender's step, and the median over the rounds of its ratio to xpoptim's."""
    for name in names:
        peers.check(name, size)
    start, gradients = peers.arrays(size, seed=0), [peers.arrays(size, seed=k) for k in (1, 2)]
    contenders = {name: peers.CONTENDERS[name](start) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(block(contenders[name], gradients, *steps))
    finally:
        gc.enable()
    own = [median(one) for one in times["xpoptim"]]
    return {
        name: {
            "median_ms": median(x for one in blocks for x in one),
            "min_ms": min(x for one in blocks for x in one),
            "ratio": median(median(one) / reference for one, reference in zip(blocks, own, strict=True)),
        }
        for name, blocks in times.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# What happens once: the first step and the import

_FIRST_STEP = """
import time
import numpy as np
import xpoptim as xo
{before}
class New(xo.Optimizer):
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-7
    slots = ("m", "v")

    @staticmethod
    def rule(xp, p, g, m, v, *, t, lr, beta1, beta2, eps):
        lr_t = lr * xp.sqrt(1 - beta2**t) / (1 - beta1**t)
        m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
        return p - lr_t * m / (xp.sqrt(v) + eps), m, v

params, grads = {{"W": np.ones(1000, np.float32)}}, {{"W": np.ones(1000, np.float32)}}
start = time.perf_counter()
New().update(params, grads)
print((time.perf_counter() - start) * 1e3)
"""
_OTHER_RULE = "xo.SGD().update({'W': np.ones(1000, np.float32)}, {'W': np.ones(1000, np.float32)})"

_IMPORT = "import time; start = time.perf_counter(); import numpy{more}; print((time.perf_counter() - start) * 1e3)"


def in_fresh_processes(scripts: dict[str, str]) -> dict[str, list[float]]:
    """What each script prints, run in turn in fresh processes; the first round only fills the bytecode cache."""
    root = str(Path(peers.xo.__file__).parents[1])
    found: dict[str, list[float]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": root}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(FRESH_PROCESSES + 1):
            for name, script in scripts.items():
                command = [sys.executable, "-c", script]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(float(done.stdout))
    return {name: values[1:] for name, values in found.items()}


def once() -> dict[str, dict[str, float]]:
    """Milliseconds of what happens once in a process."""
    first = in_fresh_processes(
        {
            "first step of a new rule": _FIRST_STEP.format(before=""),
            "the same, llvmlite imported before": _FIRST_STEP.format(before="import llvmlite.binding"),
            "the same, after another rule's step": _FIRST_STEP.format(before=_OTHER_RULE),
        }
    )
    imports = in_fresh_processes({"with": _IMPORT.format(more=", xpoptim"), "without": _IMPORT.format(more="")})
    added = [a - b for a, b in zip(imports["with"], imports["without"], strict=True)]
    figures = {name: {"median_ms": median(values), "min_ms": min(values)} for name, values in first.items()}
    least = min(imports["with"]) - min(imports["without"])
    return figures | {"import xpoptim, added to import numpy": {"median_ms": median(added), "min_ms": least}}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def circumstances(threads: int) -> dict[str, Any]:
    """Date, machine, versions and threads."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": threads,
        "load_at_start": os.getloadavg()[0],
        "versions": peers.versions(),
        "omp_settings": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))
        },
    }


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, info = Console(), report["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    console.print(f"{info['cpu']}, {info['threads']} threads; {versions}")
    if report["steps"]:
        console.print(_steps_table(Table, report["steps"]))
    if report["once"]:
        table = Table("once in a process", "median ms", "min ms")
        for name, found in report["once"].items():
            table.add_row(name, f"{found['median_ms']:.1f}", f"{found['min_ms']:.1f}")
        console.print(table)


def _steps_table(make: Callable[..., Any], steps: dict[str, Any]) -> Any:
    table = make(title="One Adam step, float32: median ms (minimum), times xpoptim's")
    table.add_column("tensors × elements")
    for size in steps:
        table.add_column(size, justify="right")
    for name in next(iter(steps.values())):
        cells = [found[name] for found in steps.values()]
        table.add_row(name, *(f"{x['median_ms']:.3g} ({x['min_ms']:.3g}) {x['ratio']:5.3g}×" for x in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--only", nargs="+", choices=peers.CONTENDERS, help="these contenders and xpoptim")
    parser.add_argument("--size", nargs="+", type=int, choices=range(len(peers.SIZES)), help="0 to 3: these sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-once", action="store_true", help="leave out first step and import")
    parser.add_argument("--against", metavar="COMMIT", help="only compare with the package at another commit")
    parser.add_argument("--without-extension", action="store_true", help="only compare with the package without it")
    parser.add_argument("--case", default="", help="of these two: only the cases with this in their names")
    asked = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    report: dict[str, Any] = {"circumstances": circumstances(asked.threads)}
    if asked.against or asked.without_extension:
        found = versions.against(asked.against, asked.threads, asked.case)
        report["against"] = {asked.against or "without the extension": found}
        write(report, asked.out)
        return
    report["once"] = {} if asked.no_once else once()
    peers.set_threads(asked.threads)
    names = ["xpoptim", *(name for name in asked.only or DEFAULT if name != "xpoptim")]
    for name in [name for name in names if peers.missing(name)]:
        print(f"without {name}: {peers.missing(name)}")
        names.remove(name)
    sizes = [peers.SIZES[k] for k in asked.size or range(len(peers.SIZES))]
    report["steps"] = {f"{k:,} × {n:,}": compare((k, n), names, *BLOCKS[k, n]) for k, n in sizes}
    show(report)
    write(report, asked.out)


def write(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
