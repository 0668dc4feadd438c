"""What ``python -m xpoptim info`` shows: versions, engines, devices, threads, and what is missing for each.

It asks for nothing but NumPy, and reports whatever goes wrong instead of raising it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import xpoptim as xo

from ..engines.choose import Choice, selected
from ..engines.cpu import native
from . import EXTRA, one_line

CUPY = "pip install '.[cuda13]' or '.[cuda12]' in xpoptim's source folder, for the CUDA version of your driver"


class Row(NamedTuple):
    """One line: what, whether it is there and usable, and which version it is or what is missing."""

    name: str
    usable: bool
    text: str


Sections = dict[str, list[Row]]


def show() -> None:
    """Print everything, in colour where rich is installed and the output is a terminal."""
    sections = gather()
    try:
        from rich.console import Console
    except Exception:  # not installed, or broken: nothing that is shown here depends on it
        show_plain(sections)
        return
    console = Console()
    if console.is_terminal:
        show_rich(sections, console)
    else:
        show_plain(sections)  # no colours, and no width to break lines at


def gather() -> Sections:
    """All that is shown, by heading."""
    cuda = probe("CUDA", cuda_devices)
    return {
        "Versions": versions(),
        "Engines": engines(cuda),
        "Devices": [probe("CPU", cpu), cuda],
        "CUDA compiler": compiler(),
        "Settings": [probe("threads", threads), probe("engine", chosen_engine)],
    }


def probe(name: str, question: Callable[[], str]) -> Row:
    """The answer of `question`, or as a line the error that it raises."""
    try:
        return Row(name, True, question())
    except Exception as error:  # a broken installation may raise anything, and that is what is to be shown
        return Row(name, False, one_line(error))


def versions() -> list[Row]:
    """The packages that xpoptim uses or works with."""
    return [
        Row("xpoptim", True, xo.__version__),
        Row("Python", True, f"{platform.python_version()} on {platform.platform()}"),
        Row("NumPy", True, np.__version__),
        installed(
            "array-api-compat", "array_api_compat", "for arrays of torch, JAX and others: pip install array-api-compat"
        ),
        probe("llvmlite", llvmlite_version),
        installed("ml_dtypes", "ml_dtypes", "optional, for bfloat16: pip install ml_dtypes"),
        probe("CuPy", lambda: load_cupy().__version__),
        installed("torch", "torch", "optional, for its tensors"),
        installed("JAX", "jax", "optional, for its arrays"),
        *(
            installed(distribution, module, "optional, for the demo: pip install '.[demo]' in xpoptim's source folder")
            for module, distribution in EXTRA.items()
        ),
    ]


def installed(distribution: str, module: str, otherwise: str) -> Row:
    """A package's version, without importing it, which takes seconds for some."""

    def version() -> str:
        if util.find_spec(module) is None:
            raise ModuleNotFoundError(f"not installed; {otherwise}")
        return metadata.version(distribution)

    return probe(distribution, version)


def llvmlite_version() -> str:
    llvm = load_llvmlite()
    return f"{llvm.__version__} with LLVM {'.'.join(map(str, llvm.binding.llvm_version_info))}"


def load_llvmlite() -> ModuleType:
    try:
        import_module("llvmlite.binding")
        return import_module("llvmlite")
    except Exception as error:
        raise ImportError(f"cannot be imported ({one_line(error)}); pip install --upgrade llvmlite") from error


def load_cupy() -> ModuleType:
    try:
        return import_module("cupy")
    except ModuleNotFoundError:
        raise ImportError(f"not installed; {CUPY}") from None
    except Exception as error:
        raise ImportError(f"cannot be imported ({one_line(error)}); {CUPY}") from error


def engines(cuda: Row) -> list[Row]:
    """Each engine, by making a step with it."""
    return [
        probe("reference", lambda: step_on(np, "reference", "any Array API namespace")),
        probe("fused, CPU", fused_cpu),
        fused_cuda(cuda),
    ]


def step_on(xp: ModuleType, engine: Choice, arrays: str) -> str:
    """Make one step and check what comes out; for which arrays the engine is there, if it is right."""
    params = {"W": xp.ones(3, dtype="float32")}
    with xo.engine(engine):
        xo.SGD(lr=0.5).update(params, {"W": xp.ones(3, dtype="float32")})
    if [float(value) for value in params["W"]] != [0.5, 0.5, 0.5]:
        raise RuntimeError(f"a step gave {params['W']} where 0.5 is right: please report this")
    return f"usable: {arrays}"


def fused_cpu() -> str:
    load_llvmlite()
    remark = f", {native.WITHOUT} ({native.missing()})" if native.missing() else ""
    return step_on(np, "fused", f"NumPy arrays{remark}")


def fused_cuda(cuda: Row) -> Row:
    if not cuda.usable:
        return Row("fused, CUDA", False, cuda.text)
    return probe("fused, CUDA", lambda: step_on(load_cupy(), "fused", "CuPy arrays"))


def compiler() -> list[Row]:
    """What makes kernels for GPUs, which needs none itself."""
    from ..engines.cuda import nvrtc

    return [Row(name, not text.startswith("missing: "), text) for name, text in nvrtc.describe().items()]


def cpu() -> str:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {os.cpu_count()} cores, {available} for this process"


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def cuda_devices() -> str:
    runtime = load_cupy().cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except Exception as error:
        raise RuntimeError(f"no device ({one_line(error)}): an NVIDIA GPU and its driver are needed") from error
    if count == 0:
        raise RuntimeError("no device: an NVIDIA GPU and its driver are needed")
    return "; ".join(cuda_device(runtime.getDeviceProperties(index), index) for index in range(count))


def cuda_device(properties: dict[str, Any], index: int) -> str:
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else name
    gib = properties["totalGlobalMem"] / 2**30
    return f"{index}: {name}, {gib:.0f} GiB, compute capability {properties['major']}.{properties['minor']}"


def threads() -> str:
    source = "XPOPTIM_NUM_THREADS" if os.environ.get("XPOPTIM_NUM_THREADS") else "the cores of this process"
    return f"{xo.get_num_threads()} at most for the fused CPU engine, from {source}"


def chosen_engine() -> str:
    source = "from XPOPTIM_ENGINE" if os.environ.get("XPOPTIM_ENGINE") else "the default"
    return f'"{selected()}", {source}'


def show_plain(sections: Sections) -> None:
    for title, rows in sections.items():
        print(title)
        for row in rows:
            print(f"  {' ' if row.usable else '-'} {row.name:<17} {row.text}")
        print()


def show_rich(sections: Sections, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    for title, rows in sections.items():
        console.print(Text(title, style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=20, no_wrap=True)
        for row in rows:
            mark = ("✓ ", "green") if row.usable else ("– ", "yellow")
            table.add_row(Text.assemble("  ", mark, row.name), Text(row.text, style="" if row.usable else "dim"))
        console.print(table)
        console.print()
