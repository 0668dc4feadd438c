"""The compiled part of the CPU engine, ``native.c``, if there is one. Without it all works, more slowly."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ..base import Columns

_NOT_BUILT = (
    "this is a source folder; what pip installs has it, and pip install -e . puts it here"
    if Path(__file__).with_name("native.c").exists()
    else "it was not built when xpoptim was installed, as where there is no C compiler, or on a free-threaded Python"
)
WITHOUT = "without the extension, so more slowly"


class Extension(Protocol):
    """What the module has. Addresses come as ints; the structs that they lead to are described in ``native.c``."""

    def perform(self, most: int, patience: int, count: int, calls: int, made: int, /) -> None:
        """Run calls one after the other with at most so many helpers. Other Python threads are let in."""

    def same(self, columns: tuple[list[object], ...] | Columns, kinds: int, watch: int, /) -> bool:
        """Whether the arrays in containers of these types are as before. The table's pointers follow the gradients."""

    def step(
        self, containers: tuple[object, ...], inputs: list[float], step: int, most: int, patience: int, made: int, /
    ) -> bool:
        """`same` for the containers of a step, and if so its calls. Whether they were run."""

    def states(self) -> list[int]:
        """Of the helpers that there are: 0 asleep, 1 awake, 2 a job lies before it, 3 at work."""


@cache
def _loaded() -> tuple[Extension | None, str]:
    """The module, or None and why."""
    setting = os.environ.get("XPOPTIM_NATIVE", "").strip()
    if setting not in ("", "0", "1"):
        raise ValueError(f"XPOPTIM_NATIVE is {setting!r}: set it to 0 to run without the extension, or to 1")
    if setting == "0":
        return None, "XPOPTIM_NATIVE is 0"
    try:
        return cast(Extension, import_module("._native", __package__)), ""
    except ModuleNotFoundError:
        return None, _NOT_BUILT
    except ImportError as error:  # it is there, but was made for another Python or NumPy
        warnings.warn(
            f"xpoptim's extension cannot be loaded, so steps are slower: {error}", RuntimeWarning, stacklevel=2
        )
        return None, f"it cannot be loaded: {error}"


def extension() -> Extension | None:
    return _loaded()[0]


def missing() -> str:
    """Why there is no extension, or an empty string."""
    return _loaded()[1]
