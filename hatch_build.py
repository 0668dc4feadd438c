"""Builds the extension of the CPU engine, ``xpoptim/engines/cpu/native.c``, into the wheel.

Without a C compiler, on Windows and for a free-threaded Python the package is built without it: all works, slower.
``XPOPTIM_REQUIRE_NATIVE=1`` makes that an error. An error in the extension itself always is one.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.bdist_wheel import get_platform
from setuptools.errors import CompileError, LinkError

NAME = "xpoptim.engines.cpu._native"
SOURCE = "xpoptim/engines/cpu/native.c"
# What the extension takes for granted: without it there is no compiler to speak of. A C++ compiler has no _Atomic.
PROBE = "#include <Python.h>\n#include <pthread.h>\n#include <stdatomic.h>\n_Atomic int PyInit_probe;\n"


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        reason = _unsupported() or _no_compiler()
        if reason:
            if os.environ.get("XPOPTIM_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise RuntimeError(f"XPOPTIM_REQUIRE_NATIVE is set, but the extension cannot be built: {reason}")
            self.app.display_warning(f"xpoptim is built without its extension, its steps are slower: {reason}")
            return
        self._work = tempfile.mkdtemp()
        built = _compiled(NAME, Path(self.root) / SOURCE, self._work)
        if version == "editable":
            shutil.copy(built, Path(self.root, SOURCE).with_name(built.name))
            return
        build_data["force_include"][str(built)] = str(Path(SOURCE).with_name(built.name))
        build_data["pure_python"] = False
        build_data["tag"] = _tag(self._work)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(getattr(self, "_work", ""), ignore_errors=True)


def _tag(built: str) -> str:
    """Of a wheel with what was built there. For macOS 14.5 it says 14.0: pip takes no other."""
    return f"cp311-abi3-{get_platform(built).replace('.', '_')}"


def _unsupported() -> str:
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return f"it is for CPython with a global lock, not {sys.version.split(' [')[0]}"
    if sys.maxsize < 2**32:
        return "it is for 64 bits"
    return "" if os.name == "posix" else f"it needs POSIX threads, which {sys.platform} has not"


def _no_compiler() -> str:
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "probe.c"
        source.write_text(PROBE)
        try:
            _compiled("probe", source, work)
        except (CompileError, LinkError, OSError) as error:
            return f"no C11 compiler that finds Python's headers ({error})"
    return ""


def _compiled(name: str, source: Path, work: str) -> Path:
    extension = Extension(
        name,
        [str(source)],
        include_dirs=[numpy.get_include()],
        extra_compile_args=["-std=c11", "-O2"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    command = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = work
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(name))
