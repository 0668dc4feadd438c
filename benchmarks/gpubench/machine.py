"""What is here and what is missing, how the check goes on without it, and the card's clock."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "llvmlite", "torch", "ml_dtypes", "pytest")
PACKAGES = (*PACKAGES, "hypothesis", "array-api-compat")


@dataclass
class Finding:
    """A thing that the check uses."""

    name: str
    found: str  # version or place, or what is wrong with it
    missing: bool = False
    without: str = ""  # how it goes on if it is missing
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.name:17} {self.found}" + (f": {self.without}" if self.missing else "")


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's type and text."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


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


def compute_sanitizer() -> str:
    """Its path, or an empty string."""
    places = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next((place for place in places if os.access(place, os.X_OK)), "")


@cache
def no_torch() -> str:
    """Why torch cannot be compared with, or an empty string."""
    if find_spec("torch") is None:
        return "torch is not installed"
    try:
        import torch

        return "" if torch.cuda.is_available() else f"torch {torch.__version__} has no CUDA"
    except Exception as error:  # whatever a broken installation raises
        return f"torch cannot be used ({one_line(error)})"


def gpu_finding() -> Finding:
    finding = Finding("GPU", "", fatal=True, without="there is no GPU to run on; nothing was measured")
    try:
        import cupy

        if not cupy.cuda.is_available():
            finding.found = "CuPy finds no NVIDIA GPU, or no driver for it"
        else:
            cupy.zeros(1).get()
            finding.found = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
            return finding
    except Exception as error:
        finding.found = f"cannot be used ({one_line(error)})"
    finding.missing = True
    return finding


def nvrtc_finding() -> Finding:
    from xpoptim.engines.cuda import nvrtc

    without = (
        "xpoptim's kernels cannot be compiled: the tests are skipped, its rows hold the error, the others are timed"
    )
    try:
        return Finding("NVRTC", ".".join(map(str, nvrtc.version())))
    except Exception as error:
        return Finding("NVRTC", f"cannot be used ({one_line(error)})", True, without)


def findings() -> list[Finding]:
    """Everything that is looked for; a fatal one that is missing ends the list."""
    found: list[Finding] = []
    for module in ("numpy", "cupy"):
        try:
            found.append(Finding(module, __import__(module).__version__))
        except Exception as error:
            found.append(
                Finding(module, f"cannot be imported ({one_line(error)})", True, "nothing can be run", fatal=True)
            )
            return found
    found.append(gpu_finding())
    if found[-1].missing:
        return found
    found.append(nvrtc_finding())
    reason = no_torch()
    torch = reason.removeprefix("torch ") or installed("torch")
    found.append(Finding("torch", torch, bool(reason), "nothing is compared with it"))
    no_tests = "the tests are not run"
    for name, without in {
        "llvmlite": "there is no CPU engine to compare bits with: tests and small run fail",
        "pytest": no_tests,
        "hypothesis": no_tests,
        "ml_dtypes": f"{no_tests} (they use bfloat16)",
        "pytest-timeout": "a test that hangs ends all tests",
        "array-api-compat": "NumPy and CuPy arrays do not need it",
        "array-api-strict": "the tests of tests/gpu do not need it",
        "nvidia-ml-py": "driver and clock are asked of nvidia-smi",
    }.items():
        version = installed(name)
        found.append(Finding(name, version or "not installed", not version, without))
    place = compute_sanitizer()
    found.append(Finding("compute-sanitizer", place or "not found", not place, "memcheck and racecheck are not run"))
    smi = shutil.which("nvidia-smi") or ""
    found.append(
        Finding(
            "nvidia-smi", smi or "not found", not smi, "driver and clock are known only where nvidia-ml-py is installed"
        )
    )
    return found


def describe() -> dict[str, Any]:
    """The card, its driver, the versions of all that takes part, the date and the commit."""
    import cupy

    import xpoptim as xo
    from xpoptim.engines.cuda import nvrtc

    about = cupy.cuda.runtime.getDeviceProperties(0)
    try:
        nvrtc_version = ".".join(map(str, nvrtc.version()))
    except Exception:
        nvrtc_version = "missing"
    return {
        "card": about["name"].decode(),
        "memory_bytes": int(about["totalGlobalMem"]),
        "l2_bytes": int(about["l2CacheSize"]),
        "multiprocessors": int(about["multiProcessorCount"]),
        "compute_capability": f"{about['major']}.{about['minor']}",
        "driver": Clock().driver() or "unknown",
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "runtime_cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "nvrtc": nvrtc_version,
        "python": platform.python_version(),
        "system": platform.platform(),
        "xpoptim": xo.__version__,
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("XPOPTIM_COMMIT") or command("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(command("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
    }


class Clock:
    """The card's SM clock and driver, from NVML where its Python package is there, else from nvidia-smi."""

    def __init__(self) -> None:
        self._handle: Any = None
        try:
            import cupy

            self.bus = cupy.cuda.runtime.deviceGetPCIBusId(0)
        except Exception:
            self.bus = ""
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(self.bus.encode())
            self._nvml = pynvml
        except Exception:  # not installed, or not allowed here
            self._handle = None

    def sm_mhz(self) -> int | None:
        try:
            if self._handle is not None:
                return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))
            return int(self._query("clocks.sm"))
        except Exception:
            return None

    def driver(self) -> str:
        """Its version, or an empty string."""
        try:
            if self._handle is not None:
                version = self._nvml.nvmlSystemGetDriverVersion()
                return version.decode() if isinstance(version, bytes) else version
        except Exception:
            pass
        return self._query("driver_version")

    def _query(self, what: str) -> str:
        bus = (f"--id={self.bus}",) if self.bus else ()
        words = ("nvidia-smi", *bus, f"--query-gpu={what}", "--format=csv,noheader,nounits")
        return command(*words).partition("\n")[0]
