"""Two runs that are watched from outside: all kernels once on small arrays, and a first step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .cases import FIRST_STEPS
from .machine import one_line
from .record import Record


def small() -> None:
    """All kernels on small arrays, to be watched by a memory checker; the bits are compared with NumPy's.

    Every array is an allocation of its own, so that what reaches beyond one is seen.
    """
    import cupy

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for dtype, count in (("float32", 6), ("float16", 6), ("float32", 700)):
            _small_steps(rng, dtype, count, stream)
        _small_dropout(rng)
    stream.synchronize()


def _small_steps(rng: Any, dtype: str, count: int, stream: Any) -> None:
    """Ordinary steps, a capture and replays, with every table: by value for 6 tensors, in memory for 700."""
    import cupy

    import xpoptim as xo

    sizes = [(0, 1, 5, 1023, 4097, 9001)[i % 6] if count < 10 else i % 5 for i in range(count)]
    params = {f"{i}": rng.standard_normal(n).astype(dtype) for i, n in enumerate(sizes)}
    on_gpu = {key: cupy.asarray(p) for key, p in params.items()}
    # Behind an element that shifts them off 16 bytes.
    grads = {key: cupy.zeros(p.size + 1, dtype)[1:] for key, p in params.items()}
    opt, expected = (xo.Adam(lr=0.01, clip_norm=0.5, capturable=True) for _ in range(2))
    graph: Any = None
    for step in range(4):
        values = {key: rng.standard_normal(p.shape).astype(dtype) for key, p in params.items()}
        for key, g in values.items():
            grads[key][...] = cupy.asarray(g)
        if step < 2:
            opt.update(on_gpu, grads)
        else:
            if graph is None:
                stream.begin_capture()
                opt.update(on_gpu, grads)
                graph = stream.end_capture()
            opt.prepare_replay()
            graph.launch(stream)
        expected.update(params, values)
    for key, p in params.items():
        assert on_gpu[key].get().tobytes() == p.tobytes(), f"{dtype}, {count} tensors: bits differ in {key}"


def _small_dropout(rng: Any) -> None:
    import cupy

    import xpoptim as xo

    for dtype in ("float32", "float16", "float64"):
        x = rng.standard_normal(4099).astype(dtype)
        drop, same = xo.Dropout(0.3, seed=1), xo.Dropout(0.3, seed=1)
        for name in ("forward", "backward"):
            found, expected = getattr(drop, name)(cupy.asarray(x)).get(), getattr(same, name)(x)
            assert found.tobytes() == expected.tobytes(), f"{dtype}: bits of Dropout.{name} differ"


def first_step(rule: str) -> float:
    """Seconds that the first step takes in this process."""
    import cupy

    import xpoptim as xo

    p, g = {"W": cupy.ones(1000, np.float32)}, {"W": cupy.ones(1000, np.float32)}
    cupy.cuda.get_current_stream().synchronize()
    opt = xo.Adam(clip_norm=1.0) if rule == "clip_norm" else xo.Adam()
    start = time.perf_counter()
    opt.update(p, g)
    cupy.cuda.get_current_stream().synchronize()
    return time.perf_counter() - start


def first_steps(record: Record, script: Path, options: list[str]) -> None:
    """The same in fresh processes, with nothing in the cache of kernels and with all of it there."""
    for rule in FIRST_STEPS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("nothing cached", "cached"):
                seconds, error = _fresh([sys.executable, str(script), "first", rule, *options], cache)
                record.first_steps[f"{rule}, {state}"] = {"seconds": seconds, "error": error}
                record.save()
                print(f"{rule}, {state}: {error or seconds}", flush=True)


def _fresh(words: list[str], cache: str) -> tuple[float | None, str]:
    """The number that a command prints last, and what went wrong."""
    environment = os.environ | {"XPOPTIM_CACHE_DIR": cache}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        return None, one_line(error)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return None, "; ".join([f"exit status {done.returncode}", *last])
    return float(done.stdout.split()[-1]), ""
