"""The compiled part of the CPU engine, if there is one. Without it all works, with the same bits, but slower."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _native

_NOT_BUILT = "this installation was built without it, as where there is no C compiler, or Python is free-threaded"


@cache
def _loaded() -> tuple[object, str]:
    """The module, or None and why."""
    if os.environ.get("XPOPTIM_NATIVE", "").strip() == "0":
        return None, "XPOPTIM_NATIVE is 0"
    try:
        return import_module("._native", __package__), ""
    except ModuleNotFoundError:
        return None, _NOT_BUILT
    except ImportError as error:  # it is there, but made for another Python or NumPy
        warnings.warn(f"xpoptim's extension cannot be loaded, steps are slower: {error}", RuntimeWarning, stacklevel=2)
        return None, f"it cannot be loaded: {error}"


def extension() -> _native | None:
    return _loaded()[0]


def missing() -> str:
    """Why there is no extension, or an empty string."""
    return _loaded()[1]
