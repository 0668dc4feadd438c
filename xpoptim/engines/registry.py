"""Which engine has kernels for the arrays of which library: one line each."""

from __future__ import annotations

from importlib import import_module

from ..arrays.namespaces.libraries import Library
from .base import KernelEngine

# The name of a library: the engine, or the module that has it, imported when the first such array comes.
ENGINES: dict[str, KernelEngine | str] = {
    "numpy": ".cpu.engine",
    "cupy": ".cuda.engine",
}


def kernels_for(library: Library) -> KernelEngine | None:
    """The engine with kernels for a library's arrays, or None."""
    engine = ENGINES.get(library.name)
    if isinstance(engine, str):
        engine = ENGINES[library.name] = import_module(engine, __package__).ENGINE
    return engine
