"""Time optimizer steps on a GPU against others, in one process: ``python benchmarks/gpu.py``; gpu_check.sh calls it.

What is done so that the comparison is fair:

* Everything runs on one stream. Contenders take turns, a block of steps each, in an order that moves on by one each
  round. The median of the blocks is reported; ratios are taken within each round, and their median is reported.
* A step's time is that between two events of the GPU around a block, divided by the steps: what the host needs is in
  it wherever the host is the slower one. The host's own time is taken apart, with nothing left for the GPU to do.
* xpoptim gets other gradient arrays at every step, as backpropagation leaves them. The others keep theirs, which
  spares them work.
* Bandwidth is what the step must move at least (Adam: 28 bytes for each float32 element) over its time, beside that of
  a copy within the GPU (8 bytes an element) in the same rounds. Where everything fits into the L2 cache, both are
  faster than memory.
* Before it is timed, every contender's first steps are compared with the formula in float64, in each case anew.

Results go to one JSON file and one table. Without a GPU it says so in one line, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np

ROOT = Path(__file__).parent.parent
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7}
CLIP = 1.0
ADAM_BYTES = 28  # of an element: p, g, m and v are read, p, m and v written
LARGE = 100_000_000

# Tensors and elements of each: the bandwidth, the overhead, and both.
ONE_TENSOR = [(1, n) for n in (1_000_000, 4_000_000, 16_000_000, LARGE, 500_000_000)]
MANY_TENSORS = [(1, 1_000), (100, 1_000), (1_000, 1_000), (10_000, 1_000), (1_000, 100_000)]

BLOCK = 0.03  # seconds that a block of steps should take
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
SAMPLE = 1000  # elements at either end of a tensor that are compared with the formula


@dataclass
class Row:
    """What was measured of one contender in one case."""

    case: str
    contender: str
    tensors: int
    elements: int  # of each tensor
    bytes_per_step: float
    step_ms: list[float] = field(default_factory=list)  # one for each round
    host_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # that a step takes for a while, beyond parameters, gradients and state
    note: str = ""

    @property
    def median_ms(self) -> float | None:
        return median(self.step_ms) if self.step_ms else None

    @property
    def median_host_ms(self) -> float | None:
        return median(self.host_ms) if self.host_ms else None

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.bytes_per_step / self.median_ms / 1e6 if self.median_ms else None


# ---------------------------------------------------------------------------------------------------------------------
# Is there a GPU, and what is it


def why_not() -> str:
    """Why nothing can be measured here, in one line, or an empty string."""
    if find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "CuPy finds no NVIDIA GPU, or no driver for it"
    except Exception as error:  # whatever a broken installation raises
        return f"CuPy cannot be used: {' '.join(str(error).split())}"
    return ""


def machine() -> dict[str, Any]:
    """The card, its driver, and the versions of all that takes part."""
    import cupy

    import xpoptim as xo
    from xpoptim.engines import nvrtc

    about = cupy.cuda.runtime.getDeviceProperties(0)
    names = ("numpy", "torch", "array-api-compat", "llvmlite", "ml_dtypes", "cupy-cuda13x", "cupy-cuda12x")
    return {
        "card": about["name"].decode(),
        "memory_bytes": int(about["totalGlobalMem"]),
        "l2_bytes": int(about["l2CacheSize"]),
        "multiprocessors": int(about["multiProcessorCount"]),
        "compute_capability": f"{about['major']}.{about['minor']}",
        "driver": command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "runtime_cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.version())),
        "python": platform.python_version(),
        "system": platform.platform(),
        "xpoptim": xo.__version__,
        "versions": {name: version for name in names if (version := installed(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("XPOPTIM_COMMIT") or command("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(command("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
    }


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def command(*words: str) -> str:
    """What a command prints, or an empty string where it cannot run."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each has float32 parameters of its own on the GPU, and shares the gradients with the others


class Contender:
    """``step`` is one step; ``sample`` gives the ends of a parameter as NumPy arrays."""

    corrected_eps = False  # whether eps is added to the corrected root, as in torch
    clips = False

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        self.names = [f"W{i}" for i in range(len(start))]
        self.params = dict(zip(self.names, [p.copy() for p in start], strict=True))
        self.grads = [dict(zip(self.names, g, strict=True)) for g in grads]
        self.turn = 0
        self.changing = False

    def next_grads(self) -> dict[str, Any]:
        if self.changing:
            self.turn = (self.turn + 1) % len(self.grads)
        return self.grads[self.turn]

    def step(self) -> None:
        raise NotImplementedError

    def sample(self, which: int) -> np.ndarray:
        return ends(self.params[self.names[which]]).get()


def ends(array: Any) -> Any:
    """The first and the last elements."""
    import cupy

    return cupy.concatenate([array[:SAMPLE], array[-SAMPLE:]])


class Xpoptim(Contender):
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import xpoptim as xo

        super().__init__(start, grads)
        self.optimizer = xo.Adam(**ADAM, **self.options)

    def step(self) -> None:
        self.optimizer.update(self.params, self.next_grads())


class XpoptimClipped(Xpoptim):
    clips = True
    options: ClassVar = {"clip_norm": CLIP}


class XpoptimGraph(Xpoptim):
    """A captured update, replayed."""

    options: ClassVar = {"capturable": True}

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        super().__init__(start, grads)
        self.graph: Any = None

    def step(self) -> None:
        import cupy

        if self.optimizer.state["step"] == 0:  # compiles and allocates
            super().step()
            return
        if self.graph is None:
            stream = cupy.cuda.get_current_stream()
            stream.begin_capture()
            self.optimizer.update(self.params, self.grads[0])
            self.graph = stream.end_capture()
            self.step = self.replay  # type: ignore[method-assign]
        self.replay()

    def replay(self) -> None:
        self.optimizer.prepare_replay()
        self.graph.launch()


class CupyCode(Contender):
    """The formulas as plain CuPy code, temporaries and all, as a textbook has them."""

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import cupy

        from xpoptim.demo.plain import PlainAdam

        super().__init__(start, grads)
        self.optimizer = PlainAdam(xp=cupy, **ADAM)

    def step(self) -> None:
        self.optimizer.update(self.params, self.next_grads())


class CupyKernel(Contender):
    """One fused ``cupy.ElementwiseKernel``, launched for each tensor."""

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import cupy

        super().__init__(start, grads)
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


class Torch(Contender):
    """``torch.optim.Adam``, with ``fused=True`` or ``foreach=True``."""

    corrected_eps = True
    kind = "fused"

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import torch

        super().__init__(start, grads[:1])
        # The memory of CuPy's arrays: no copies.
        self.tensors = [torch.as_tensor(p, device="cuda").requires_grad_() for p in self.params.values()]
        for tensor, g in zip(self.tensors, grads[0], strict=True):
            tensor.grad = torch.as_tensor(g.copy() if self.clips else g, device="cuda")
        betas = (ADAM["beta1"], ADAM["beta2"])
        self.optimizer = torch.optim.Adam(self.tensors, ADAM["lr"], betas, ADAM["eps"], **{self.kind: True})
        self.step = self.optimizer.step  # type: ignore[method-assign]


class TorchForeach(Torch):
    kind = "foreach"


class TorchClipped(Torch):
    clips = True

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import torch

        super().__init__(start, grads)
        clip, step, tensors = torch.nn.utils.clip_grad_norm_, self.optimizer.step, self.tensors

        def clipped() -> None:
            clip(tensors, CLIP, foreach=True)
            step()

        self.step = clipped  # type: ignore[method-assign]


class Copy(Contender):
    """A copy from one array to another, of all tensors' size: what memory can do."""

    def __init__(self, start: list[Any], grads: list[list[Any]]) -> None:
        import cupy

        super().__init__([], [[]])
        size = sum(p.size for p in start)
        self.source, self.target = cupy.ones(size, np.float32), cupy.empty(size, np.float32)

    def step(self) -> None:
        import cupy

        self.target.data.copy_from_device_async(self.source.data, self.source.nbytes, cupy.cuda.get_current_stream())


CONTENDERS: dict[str, type[Contender]] = {
    "xpoptim": Xpoptim,
    "xpoptim, graph": XpoptimGraph,
    "torch fused": Torch,
    "torch foreach": TorchForeach,
    "CuPy kernel": CupyKernel,
    "CuPy code": CupyCode,
    "copy": Copy,
    "xpoptim, clip_norm": XpoptimClipped,
    "torch fused, clip": TorchClipped,
}
PLAIN = ("xpoptim", "torch fused", "torch foreach", "CuPy kernel", "CuPy code", "copy")
CLIPPED = ("xpoptim, clip_norm", "torch fused, clip")


def bytes_per_element(name: str) -> int:
    return {"copy": 8, **dict.fromkeys(CLIPPED, ADAM_BYTES + 4)}.get(name, ADAM_BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# Correctness, before anything is timed


def check(name: str, contender: Contender, start: list[Any], steps: int = 3) -> None:
    """Compare the ends of some tensors after the first steps with the formula in float64."""
    from xpoptim.demo.plain import PlainAdam

    if isinstance(contender, Copy):
        contender.step()
        assert bool((contender.target == 1).all())
        return
    for _ in range(steps):
        contender.step()
    scale = 1.0
    if contender.clips:
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in contender.grads[0].values()))
        scale = min(1.0, CLIP / norm)
    for which in {0, len(contender.names) // 2, len(contender.names) - 1}:
        wide = {"W": ends(start[which]).get().astype(np.float64)}
        g = {"W": ends(contender.grads[0][contender.names[which]]).get().astype(np.float64) * scale}
        optimizer = PlainAdam(xp=np, **ADAM)
        for t in range(1, steps + 1):
            if contender.corrected_eps:
                optimizer.eps = ADAM["eps"] * math.sqrt(1 - ADAM["beta2"] ** t)
            optimizer.update(wide, g)
        np.testing.assert_allclose(contender.sample(which), wide["W"], rtol=2e-5, atol=2e-6, err_msg=name)


def small_run() -> None:
    """All kernels once on small arrays, to be watched by a memory checker; the bits are compared with NumPy's.

    Every array is an allocation of its own, so that what reaches beyond one is seen.
    """
    import cupy

    import xpoptim as xo

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for dtype, count in (("float32", 6), ("float16", 6), ("float32", 700)):
            sizes = [(0, 1, 5, 1023, 4097, 9001)[i % 6] if count < 10 else i % 5 for i in range(count)]
            params = {f"{i}": rng.standard_normal(n).astype(dtype) for i, n in enumerate(sizes)}
            on_gpu = {key: cupy.asarray(p) for key, p in params.items()}
            # Behind an element that shifts them off 16 bytes.
            rooms = {key: cupy.zeros(p.size + 1, dtype) for key, p in params.items()}
            grads = {key: room[1:] for key, room in rooms.items()}
            opt, expected = (xo.Adam(lr=0.01, clip_norm=0.5, capturable=True) for _ in range(2))
            graph = None
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
        x = cupy.asarray(rng.standard_normal(4099).astype(np.float32))
        drop, same = xo.Dropout(0.3, seed=1), xo.Dropout(0.3, seed=1)
        assert drop.forward(x).get().tobytes() == same.forward(x.get()).tobytes()
    stream.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@contextlib.contextmanager
def one_stream() -> Iterator[Any]:
    """One stream for CuPy and torch."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if find_spec("torch") is not None:
            import torch

            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)))
        yield stream
        stream.synchronize()


def block(contender: Contender, steps: int, stream: Any) -> float:
    """Milliseconds a step."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    contender.step()  # the GPU has something to do while the first counted step is on its way
    begin.record(stream)
    for _ in range(steps):
        contender.step()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) / steps


def host_time(contender: Contender, stream: Any) -> float:
    """Milliseconds that a call of ``step`` takes when the GPU has nothing left to do."""
    stream.synchronize()
    start = time.perf_counter()
    contender.step()
    took = time.perf_counter() - start
    stream.synchronize()
    return took * 1e3


def arrays(tensors: int, elements: int, seed: int) -> list[Any]:
    import cupy

    rng = cupy.random.default_rng(seed)
    return [rng.standard_normal(elements, dtype=np.float32) for _ in range(tensors)]


def free_memory() -> None:
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def measure(case: str, tensors: int, elements: int, names: tuple[str, ...], seconds: float, stream: Any) -> list[Row]:
    """All contenders of a case, in turns, until the time is over."""
    import cupy

    total = tensors * elements
    sets = 2 if total <= LARGE else 1  # of gradients
    start, grads = arrays(tensors, elements, 0), [arrays(tensors, elements, k + 1) for k in range(sets)]
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        row = rows[name] = Row(case, name, tensors, elements, float(bytes_per_element(name)) * total)
        needed = 44 * total  # plain code with its temporaries, generously
        if name.startswith("torch") and find_spec("torch") is None:
            row.note = "torch is not installed"
        elif cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes() < needed:
            row.note = f"less than {needed / 1e9:.0f} GB of memory were left"
        else:
            contenders[name] = CONTENDERS[name](start, grads)
            check(name, contenders[name], start)
            contenders[name].changing = True
    steps = {name: max(1, min(200, math.ceil(BLOCK * 1e3 / block(c, 3, stream)))) for name, c in contenders.items()}
    deadline, order = time.perf_counter() + seconds, list(contenders)
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            break
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            rows[name].step_ms.append(block(contenders[name], steps[name], stream))
            if name != "copy":
                rows[name].host_ms += [host_time(contenders[name], stream) for _ in range(3 if steps[name] > 3 else 1)]
    for name, contender in contenders.items():
        if name != "copy" and total >= LARGE:
            rows[name].peak_bytes = peak(contender, stream)
    contenders.clear()
    return list(rows.values())


def peak(contender: Contender, stream: Any) -> int:
    """The most bytes that a step takes for a while, from CuPy's pool or from torch's."""
    import cupy

    class Watch(cupy.cuda.MemoryHook):
        name = "watch"
        now = most = 0

        def malloc_postprocess(self, **about: Any) -> None:
            self.now += about["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **about: Any) -> None:
            self.now -= about["mem_size"]

    stream.synchronize()
    torch = sys.modules.get("torch")
    before = 0
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Watch() as watch:
        contender.step()
    stream.synchronize()
    return watch.most + (torch.cuda.max_memory_allocated() - before if torch is not None else 0)


FIRST_STEP = """
import sys, time, cupy, numpy as np, xpoptim as xo
p, g = {"W": cupy.ones(1000, np.float32)}, {"W": cupy.ones(1000, np.float32)}
cupy.cuda.get_current_stream().synchronize()
opt = xo.Adam(clip_norm=1.0) if sys.argv[1] == "clip_norm" else xo.Adam()
start = time.perf_counter()
opt.update(p, g)
cupy.cuda.get_current_stream().synchronize()
print(time.perf_counter() - start)
"""


def first_steps(runs: int = 2) -> dict[str, list[float]]:
    """Seconds that the first step takes in fresh processes, with nothing in the cache and with all of it there."""
    found: dict[str, list[float]] = {}
    for rule in ("Adam", "clip_norm"):
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {"XPOPTIM_CACHE_DIR": cache, "PYTHONPATH": python_path()}
                for state in ("nothing cached", "cached"):
                    words = [sys.executable, "-c", FIRST_STEP, rule]
                    done = subprocess.run(
                        words, env=environment, capture_output=True, text=True, check=True, timeout=120
                    )
                    found.setdefault(f"{rule}, {state}", []).append(float(done.stdout))
    return found


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def cases() -> list[tuple[str, int, int, tuple[str, ...]]]:
    """Name, tensors, elements and contenders; what matters most comes first, in case time runs out."""
    one = [("one tensor", *size, PLAIN) for size in ONE_TENSOR]
    many = [("many tensors", *size, ("xpoptim, graph", *PLAIN)) for size in MANY_TENSORS]
    clipped = [("clip_norm", *size, (*CLIPPED, "copy")) for size in ((1, LARGE), (1_000, 1_000))]
    return [*one, *many, *clipped]


def run_all(seconds: float) -> list[Row]:
    found: list[Row] = []
    todo, end = cases(), time.perf_counter() + seconds
    with one_stream() as stream:
        for number, (case, tensors, elements, names) in enumerate(todo):
            share = max(0.5, (end - time.perf_counter()) / (len(todo) - number))
            print(f"{case}: {tensors:,} x {elements:,} ...", file=sys.stderr, flush=True)
            found += measure(case, tensors, elements, names, share, stream)
            free_memory()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def ratio(rows: list[Row], a: str, b: str, *, host: bool = False) -> float | None:
    """How many times as long ``b`` takes as ``a``: the median of the rounds' ratios. Rows of one case."""
    by_name = {row.contender: (row.host_ms if host else row.step_ms) for row in rows}
    pairs = list(zip(by_name.get(a, []), by_name.get(b, []), strict=False))
    return median(y / x for x, y in pairs) if pairs else None


def of_copy(rows: list[Row], name: str) -> float | None:
    """The bandwidth as a share of the copy's."""
    by_name = {row.contender: row for row in rows}
    times = ratio(rows, name, "copy")
    return times * by_name[name].bytes_per_step / by_name["copy"].bytes_per_step if times is not None else None


def grouped(rows: list[Row]) -> dict[tuple[str, int, int], list[Row]]:
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.tensors, row.elements), []).append(row)
    return groups


def targets(rows: list[Row]) -> list[str]:
    """The promises, each with what was measured."""
    groups, lines = grouped(rows), []

    def judge(what: str, value: float | None, least: float, unit: str = "") -> None:
        verdict = "not measured" if value is None else "met" if value >= least else "MISSED"
        measured = "" if value is None else f" ({value:.2f}{unit})"
        lines.append(f"{verdict:12}  {what}: at least {least:g}{unit}{measured}")

    judge(
        f"of a copy's bandwidth at {LARGE:,} elements",
        of_copy(groups.get(("one tensor", 1, LARGE), []), "xpoptim"),
        0.9,
    )
    for (case, tensors, elements), group in groups.items():
        name = "xpoptim, clip_norm" if case == "clip_norm" else "xpoptim"
        peer = "torch fused, clip" if case == "clip_norm" else "torch fused"
        judge(f"{peer} over {name}, {tensors:,} x {elements:,}", ratio(group, name, peer), 1.0, "x")
    for (case, tensors, elements), group in groups.items():
        if case != "clip_norm":
            judge(f"CuPy code over xpoptim, {tensors:,} x {elements:,}", ratio(group, "xpoptim", "CuPy code"), 5.0, "x")
    thousand = groups.get(("many tensors", 1_000, 1_000), [])
    judge(
        "torch fused's host time over xpoptim's, 1,000 tensors",
        ratio(thousand, "xpoptim", "torch fused", host=True),
        2.0,
        "x",
    )
    return lines


def table(rows: list[Row]) -> str:
    head = ("tensors", "elements", "contender", "step ms", "GB/s", "of copy", "host ms", "times xpoptim", "peak MB")
    lines = [head]
    for (case, tensors, elements), group in grouped(rows).items():
        first = "xpoptim, clip_norm" if case == "clip_norm" else "xpoptim"
        for row in group:
            slower = ratio(group, first, row.contender)
            lines.append(
                (
                    f"{tensors:,}",
                    f"{elements:,}",
                    row.contender,
                    number(row.median_ms, 4) or row.note,
                    number(row.gigabytes_per_second, 0),
                    number(of_copy(group, row.contender), 2) if row.step_ms else "",
                    number(row.median_host_ms, 3),
                    number(slower, 2) if row.contender != "copy" else "",
                    "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
                )
            )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    texts = [
        "  ".join(
            cell.ljust(width) if k == 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def derived(row: Row, group: list[Row]) -> dict[str, float | None]:
    return {
        "median_step_ms": row.median_ms,
        "median_host_ms": row.median_host_ms,
        "gigabytes_per_second": row.gigabytes_per_second,
        "of_copy": of_copy(group, row.contender),
    }


def write(
    folder: Path, about: dict[str, Any], rows: list[Row], first: dict[str, list[float]], checks: dict[str, str]
) -> Path:
    """One JSON file, named after the card and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    card = re.sub("[^a-z0-9]+", "-", about["card"].lower()).strip("-")
    path = folder / f"gpu-{card}-{about['date'][:10]}.json"
    groups = grouped(rows)
    content = {
        "machine": about,
        "checks": checks,
        "rows": [asdict(row) | derived(row, groups[row.case, row.tensors, row.elements]) for row in rows],
        "first_step_seconds": first,
        "targets": targets(rows),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON file")
    parser.add_argument("--seconds", type=float, default=110.0, help="for the steps, about (default: 110)")
    parser.add_argument("--checks", default="", help="outcomes to record, such as tests=passed,memcheck=passed")
    parser.add_argument("--probe", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--small", action="store_true", help="all kernels once on small arrays, for a memory checker")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    sys.path.insert(0, str(ROOT))
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  # before CuPy
    reason = why_not()
    if reason:
        print(f"benchmarks/gpu.py: no GPU to run on ({reason}); nothing was measured", file=sys.stderr)
        return 2
    if options.probe:
        return 0
    if options.small:
        small_run()
        print("small run: all bits are NumPy's")
        return 0
    about = machine()
    rows = run_all(options.seconds)
    first = first_steps()
    checks = dict(word.split("=", 1) for word in options.checks.split(",") if word)
    path = write(options.out, about, rows, first, checks)
    print(f"\n{about['card']}, driver {about['driver']}, {about['date']}, commit {about['commit'][:12] or 'unknown'}\n")
    print(table(rows))
    print("\nfirst step, seconds: " + "; ".join(f"{what} {median(times):.3f}" for what, times in first.items()))
    print("\n" + "\n".join(targets(rows)))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
