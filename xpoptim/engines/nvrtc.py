"""CUDA text to machine code, through NVRTC and ctypes alone: to compile takes neither CuPy nor a GPU.

CuPy's own compile path adds ``-ftz=true`` to every kernel, which flushes subnormals and so changes bits;
here `FLAGS` are the only options. What comes out is a cubin for one architecture, never PTX: a driver loads a
cubin of any NVRTC of its own major version, a newer one too, but PTX only of an NVRTC no newer than itself.

The kernels include no header: NVRTC knows the vector types and intrinsics of CUDA by itself. So the NVRTC
library is all that has to be installed. It is looked for among the libraries the process has loaded, in
NVIDIA's wheels, in conda's folder, under ``CUDA_PATH`` and ``CUDA_HOME``, on the loader's path and in
``/usr/local/cuda``; the first of the CUDA version that CuPy was built for is taken, or else the first.

Cubins are kept in memory and, between processes, in the folder ``XPOPTIM_CACHE_DIR``, by default ``xpoptim``
in the user's cache folder. A damaged file is compiled anew; without a folder to write to, memory has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Strict IEEE 754: no contraction, no flushing of subnormals, correctly rounded division and square root.
FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "--std=c++17")

# Kernels take a table of pointers by value. NVRTC 12.1 is the first to allow 32,764 bytes of parameters, not
# 4,096, and sm_70 (Volta) the first architecture to read them in place.
OLDEST = (12, 1)
OLDEST_ARCHITECTURE = 70

_INSTALL = (
    "Install it with pip install 'xpoptim[cuda13]', or 'xpoptim[cuda12]' where CuPy is for CUDA 12; its "
    "wheel is nvidia-cuda-nvrtc, or nvidia-cuda-nvrtc-cu12. Or let CUDA_PATH name a CUDA toolkit (12.1 or "
    "later)."
)


class NVRTCNotFound(ImportError):
    """There is no usable NVRTC library; the message says what to install and what was found instead."""


class CompileError(RuntimeError):
    """NVRTC refused the text; the message holds its log and the text with line numbers."""


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of stack, and bytes spilled to memory for want of registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        """Whether a thread keeps anything in memory.

        What is spilled around the subroutines for division and square root counts as stack alone.
        """
        return self.stack + self.spill_stores + self.spill_loads > 0


# --- compiling


def cubin(source: str, arch: str, options: Sequence[str] = ()) -> bytes:
    """Machine code of ``source`` for ``arch`` (``"sm_90"``), from the cache where it was compiled before.

    ``options`` come after `FLAGS`; of two that contradict each other NVRTC takes the last. Raises
    `NVRTCNotFound` if there is no NVRTC, ValueError if it does not know the architecture, and `CompileError`
    if it refuses the text.
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
        _memory[key] = _read(key) or _compile_and_keep(key, source, arguments)
    return _memory[key]


def ptx(source: str, arch: str, options: Sequence[str] = ()) -> str:
    """The text as PTX for ``arch`` (``"compute_90"``), to read its operations and accesses in. Not cached."""
    return _compile(source, (*FLAGS, f"-arch={arch}", *options), "PTX")[0].rstrip(b"\0").decode()


def resources(source: str, arch: str, options: Sequence[str] = ()) -> dict[str, Resources]:
    """What each kernel of the text takes on ``arch`` (``"sm_90"``), as ptxas reports it. Not cached."""
    _, log = _compile(source, (*FLAGS, f"-arch={arch}", *options, "--ptxas-options=-v"), "CUBIN")
    patterns = (
        r"Used (\d+) registers",
        r"(\d+) bytes stack frame",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
    )
    report = {}
    for kernel, body in re.findall(r"Compiling entry function '(\S+)'(.*?Used \d+ registers)", log, re.DOTALL):
        numbers = (re.search(pattern, body) for pattern in patterns)
        report[kernel] = Resources(*(int(number[1]) if number else 0 for number in numbers))
    return report


def _compile(source: str, arguments: Sequence[str], product: str) -> tuple[bytes, str]:
    """The product, "CUBIN" or "PTX", and NVRTC's log."""
    library = _library()
    program = ctypes.c_void_p()
    text = source.encode()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None))
    try:
        array = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
        status = library.nvrtcCompileProgram(program, len(arguments), array)
        log = _fetch(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            reason = library.nvrtcGetErrorString(status).decode()
            numbered = "\n".join(f"{number:5}  {line}" for number, line in enumerate(source.splitlines(), 1))
            used = " ".join(arguments)
            raise CompileError(f"NVRTC could not compile the kernel ({reason}) with {used}:\n{log}\n{numbered}")
        return _fetch(library, program, product), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(library: ctypes.CDLL, program: ctypes.c_void_p, product: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{product}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{product}")(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")


# --- what there is, and what to say where something is missing


def version() -> tuple[int, int]:
    """NVRTC's version: ``(13, 0)`` is CUDA 13.0. Raises `NVRTCNotFound`."""
    return _version(_library())


def library_path() -> str:
    """The NVRTC library in use. Raises `NVRTCNotFound`."""
    return str(_library()._name)


def architectures() -> tuple[str, ...]:
    """What kernels can be compiled for, oldest first: ``("sm_75", "sm_80", ...)``. Raises `NVRTCNotFound`."""
    library = _library()
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(numbers))
    return tuple(f"sm_{number}" for number in sorted(numbers) if number >= OLDEST_ARCHITECTURE)


def describe() -> dict[str, str]:
    """A report for people: NVRTC, its architectures, the cache's folder, or what is missing. Never raises."""
    try:
        known = architectures()
        report = {
            "NVRTC": f"{_dotted(version())}, {library_path()}",
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
            f"'xpoptim[cuda{its[0]}]', or a newer driver."
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


@functools.cache
def _library() -> ctypes.CDLL:
    """The first usable candidate. A failure is not remembered, so that what is installed later is found."""
    wanted = _cupy_major()
    rejected = []
    # The sort is stable: CuPy's major version first, otherwise the order of the search.
    for path in sorted(_candidates(), key=lambda path: wanted is not None and _major(path) != wanted):
        try:
            library = _declare(ctypes.CDLL(path))
            found = _version(library)
        except (OSError, AttributeError) as error:
            if os.sep in path:  # a name that the loader does not know is no news
                rejected.append(f"{path} ({error})")
            continue
        if found >= OLDEST:
            return library
        rejected.append(f"{path} (version {_dotted(found)} is too old)")
    unusable = f" Found, but not usable: {', '.join(rejected)}." if rejected else ""
    raise NVRTCNotFound(f"NVRTC, which compiles the CUDA kernels, was not found. {_INSTALL}{unusable}")


def _candidates() -> list[str]:
    """Files, and names for the loader, that may be an NVRTC library: each once, the preferred first."""
    places = [*_loaded(), *_installed(), "libnvrtc.so.13", "libnvrtc.so.12", *_toolkit("/usr/local/cuda")]
    return list(dict.fromkeys(places))


def _loaded() -> Iterator[str]:
    """What this process has loaded already, by way of CuPy for one."""
    with contextlib.suppress(OSError):  # there is no such file but on Linux
        for line in Path("/proc/self/maps").read_text().splitlines():
            if match := re.search(r" (/.*/libnvrtc\.so[.\d]*)$", line):
                yield match[1]


def _installed() -> Iterator[str]:
    """In NVIDIA's wheels (CUDA 13 has one folder, CUDA 12 one a library), conda and a named toolkit."""
    for entry in sys.path:
        nvidia = Path(entry, "nvidia")
        for wheel in (*sorted(nvidia.glob("cu[0-9]*"), reverse=True), nvidia / "cuda_nvrtc"):
            yield from _libraries(wheel / "lib")
    for prefix in (os.environ.get("CONDA_PREFIX"), sys.prefix):
        if prefix:
            yield from _libraries(Path(prefix, "lib"))
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if root := os.environ.get(variable):
            yield from _toolkit(root)


def _toolkit(root: str) -> Iterator[str]:
    for folder in (Path(root, "lib64"), Path(root, "lib"), *Path(root).glob("targets/*/lib")):
        yield from _libraries(folder)


def _libraries(folder: Path) -> list[str]:
    found = (str(path) for path in folder.glob("libnvrtc.so*"))
    return sorted(found, key=lambda path: _major(path) or 0, reverse=True)


def _major(path: str) -> int | None:
    """12 of ``libnvrtc.so.12``; a name without a number is a link to one that has it."""
    for name in (path, os.path.realpath(path)):
        if match := re.search(r"libnvrtc\.so\.(\d+)", name):
            return int(match[1])
    return None


def _cupy_major() -> int | None:
    """The CUDA version of the CuPy wheel, from its metadata, without importing it; None without a wheel."""
    for major in (13, 12):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(f"cupy-cuda{major}x")
            return major
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Name the types of the arguments, since ctypes would cut pointers to 32 bits."""
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures = {
        "nvrtcVersion": [pointer, pointer],
        "nvrtcGetNumSupportedArchs": [pointer],
        "nvrtcGetSupportedArchs": [pointer],
        "nvrtcGetErrorString": [number],
        "nvrtcCreateProgram": [pointer, text, text, number, pointer, pointer],
        "nvrtcCompileProgram": [pointer, number, pointer],
        "nvrtcDestroyProgram": [pointer],
    }
    for product in ("ProgramLog", "CUBIN", "PTX"):
        signatures[f"nvrtcGet{product}Size"] = signatures[f"nvrtcGet{product}"] = [pointer, pointer]
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    library.nvrtcGetErrorString.restype = text
    return library


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


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


def _compile_and_keep(key: str, source: str, arguments: Sequence[str]) -> bytes:
    image, _ = _compile(source, arguments, "CUBIN")
    _write(key, image)
    return image


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
