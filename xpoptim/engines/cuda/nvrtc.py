"""CUDA text to machine code, through CuPy's own binding of NVRTC: to compile takes CuPy, but no GPU.

CuPy's compile path adds ``-ftz=true`` to every kernel, which flushes subnormals and so changes bits; here
`FLAGS` are the only options. What comes out is a cubin for one architecture, never PTX: a driver loads a cubin
of any NVRTC of its own major version, a newer one too, but PTX only of an NVRTC no newer than itself.

The kernels include no header: NVRTC knows the vector types and intrinsics of CUDA by itself. So the NVRTC
library is all that has to be installed. CuPy 14 finds it through cuda-pathfinder: in NVIDIA's wheels, in conda's
folder, under ``CUDA_PATH`` and on the loader's path. CuPy 13 knows the loader's path alone, and is helped here.

Cubins are kept in memory and, between processes, in the folder ``XPOPTIM_CACHE_DIR``, by default ``xpoptim``
in the user's cache folder. A damaged file is compiled anew; without a folder to write to, memory has to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# Strict IEEE 754: no contraction, no flushing of subnormals, correctly rounded division and square root.
FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "--std=c++17")

# Kernels take a table of pointers by value. NVRTC 12.1 is the first to allow 32,764 bytes of parameters, not
# 4,096, and sm_70 (Volta) the first architecture to read them in place.
OLDEST = (12, 1)
OLDEST_ARCHITECTURE = 70

_INSTALL = (
    "Install what is missing with pip install '.[cuda13]' in xpoptim's source folder, or '.[cuda12]' where the driver "
    "is for CUDA 12: CuPy, NVRTC (the wheel nvidia-cuda-nvrtc, or nvidia-cuda-nvrtc-cu12) and cuda-pathfinder, by "
    "which it is found. In place of the wheel CUDA_PATH may name a CUDA toolkit (12.1 or later)."
)


class NVRTCNotFound(ImportError):
    """There is no CuPy or no usable NVRTC; the message says what to install and what was found instead."""


class CompileError(RuntimeError):
    """NVRTC refused the text; the message holds its log and the text with line numbers."""


# --- compiling


def cubin(source: str, arch: str, options: Sequence[str] = ()) -> bytes:
    """Machine code of ``source`` for ``arch`` (``"sm_90"``), from the cache where it was compiled before.

    ``options`` come after `FLAGS`, none of which they may name again. Raises `NVRTCNotFound` if there is no NVRTC,
    ValueError if it does not know the architecture, and `CompileError` if it refuses the text.
    """
    if arch not in architectures():
        raise ValueError(
            f"NVRTC {_dotted(version())} cannot compile for {arch!r}, only for {', '.join(architectures())}. "
            "For a newer GPU upgrade NVRTC and the driver; the oldest that the kernels run on is sm_70, with "
            "CUDA 12."
        )
    arguments = (*FLAGS, f"-arch={arch}", *options)
    key = _key(source, arguments)
    if key not in _memory:
        image = _read(key)
        if not image:
            image = _compile(source, arguments)
            _write(key, image)
        _memory[key] = image
    return _memory[key]


def _compile(source: str, arguments: Sequence[str]) -> bytes:
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(str(source), "kernel.cu", (), ())  # it takes no subclass, such as `Source`
    try:
        nvrtc.compileProgram(program, arguments)
        # CuPy cuts the last byte off, as a text's end. In a cubin it is the upper end of a number, which is zero.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        numbered = "\n".join(f"{number:5}  {line}" for number, line in enumerate(source.splitlines(), 1))
        used = " ".join(arguments)
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"NVRTC could not compile the kernel ({error}) with {used}:\n{log}\n{numbered}") from error
    finally:
        nvrtc.destroyProgram(program)


# --- what there is, and what to say where something is missing


def version() -> tuple[int, int]:
    """NVRTC's version: ``(13, 0)`` is CUDA 13.0. Raises `NVRTCNotFound`."""
    return _version(_nvrtc())


def architectures() -> tuple[str, ...]:
    """What kernels can be compiled for, oldest first: ``("sm_75", "sm_80", ...)``. Raises `NVRTCNotFound`."""
    numbers = sorted(_nvrtc().getSupportedArchs())
    return tuple(f"sm_{number}" for number in numbers if number >= OLDEST_ARCHITECTURE)


def describe() -> dict[str, str]:
    """A report for people: NVRTC, its architectures, the cache's folder, or what is missing. Never raises."""
    try:
        known = architectures()
        import cupy

        report = {
            "NVRTC": f"{_dotted(version())}, through CuPy {cupy.__version__}",
            "compiles for": f"{known[0]} to {known[-1]}",
        }
    except Exception as error:  # a report has to survive whatever a broken installation does
        report = {"NVRTC": f"missing: {error}"}
    folder = cache_folder()
    report["kernel cache"] = str(folder) if folder else "in memory only, since no home folder is known"
    return report


def load_error(error: Exception, arch: str, driver: int) -> RuntimeError:
    """The error to raise where the driver refuses a cubin with ``error``.

    ``driver`` is the driver's CUDA version in CUDA's spelling: 13000 is 13.0.
    """
    mine, its = version(), (driver // 1000, driver % 1000 // 10)
    if mine[0] > its[0]:
        advice = (
            "NVRTC may not be of a newer major version than the driver: install "
            f"xpoptim's extra cuda{its[0]} and remove the wheel nvidia-cuda-nvrtc, or install a newer driver."
        )
    elif mine > its:
        wheel = "nvidia-cuda-nvrtc-cu12" if its[0] == 12 else "nvidia-cuda-nvrtc"
        advice = f"Try an NVRTC no newer than the driver: pip install '{wheel}=={_dotted(its)}.*'."
    else:
        advice = "The driver is new enough for it, so the GPU may be of another architecture."
    return RuntimeError(
        f"the driver, of CUDA {_dotted(its)}, refused a kernel that NVRTC {_dotted(mine)} compiled for "
        f"{arch} ({error}). {advice}"
    )


def _dotted(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"


# --- the library


def _nvrtc() -> ModuleType:
    """CuPy's binding to a usable library. A failure is not remembered, so that what is installed later is found."""
    try:
        from cupy.cuda import nvrtc
    except Exception as error:  # a broken installation may raise anything
        raise NVRTCNotFound(
            f"CuPy, through which NVRTC compiles the CUDA kernels, cannot be imported: {_one_line(error)}. {_INSTALL}"
        ) from error
    try:
        found = _version(nvrtc)
    except Exception as error:  # CuPy 13: RuntimeError; CuPy 14: what cuda-pathfinder raises
        raise NVRTCNotFound(
            f"NVRTC, which compiles the CUDA kernels, was not found: {_one_line(error)}. {_INSTALL}"
        ) from error
    if found < OLDEST:
        raise NVRTCNotFound(f"NVRTC {_dotted(found)} is too old for the CUDA kernels. {_INSTALL}")
    return nvrtc


def _version(nvrtc: ModuleType) -> tuple[int, int]:
    try:
        return nvrtc.getVersion()
    except RuntimeError:
        if not _loaded():
            raise
        return nvrtc.getVersion()


def _loaded() -> bool:
    """Load NVRTC for CuPy 13, which asks for it by its name alone and is given what is loaded already."""
    try:
        from cuda import pathfinder

        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except (ImportError, RuntimeError):  # the latter where pathfinder does not find it either
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


# --- the cache

_MAGIC = b"xpoptim cubin 1\n"
_memory: dict[str, bytes] = {}


def cache_folder() -> Path | None:
    """Where cubins are kept between processes; None if ``XPOPTIM_CACHE_DIR`` is not set nor a home known."""
    if named := os.environ.get("XPOPTIM_CACHE_DIR"):
        return Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "xpoptim")
    try:
        return Path.home() / ".cache" / "xpoptim"
    except RuntimeError:
        return None


def _key(source: str, arguments: Sequence[str]) -> str:
    """A name for all that the cubin depends on; the architecture is one of the arguments."""
    return hashlib.sha256(json.dumps([source, *arguments, version()]).encode()).hexdigest()


def _read(key: str) -> bytes | None:
    """The kept cubin; None where there is none, or not the bytes that were written."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        content = (folder / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    image = content[start:]
    return image if content[:start] == _MAGIC + hashlib.sha256(image).digest() else None


def _write(key: str, image: bytes) -> None:
    """Keep a cubin, if that can be done.

    It is written under another name and renamed, which is atomic: readers see all of it or nothing, and of
    several writers, each with the same bytes, the last wins.
    """
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):  # a full disk, or a folder that is read-only or no folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(image).digest() + image)
            os.replace(name, folder / f"{key}.cubin")
        except OSError:
            os.unlink(name)
