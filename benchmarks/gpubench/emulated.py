"""A GPU that is emulated on the host (tests/cuda_host), and beside it what the contenders ask of CuPy.

So that a slip in the check shows without a GPU: every name that is replaced here must be CuPy's, its arguments are
bound to CuPy's own signature, and what is not replaced is CuPy itself, which raises without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from .machine import ROOT

PROPERTIES = {
    "name": b"emulated",
    "totalGlobalMem": 1 << 30,
    "l2CacheSize": 4096,
    "multiProcessorCount": 1,
    "major": 9,
    "minor": 0,
}
BUS = "0000:00:00.0"
OPERATORS = ("add", "sub", "mul", "truediv", "gt")


@contextlib.contextmanager
def emulated_device() -> Iterator[None]:
    """Enter what tests/cuda_host has, and on it stand-ins for the functions and operators that contenders use."""
    import cupy

    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_host.emulated import emulated_gpu, seen

    with emulated_gpu(devices=1) as gpu, contextlib.ExitStack() as stack:
        make = Maker(gpu.machine, seen)
        for patched in (
            mock.patch.multiple(cupy.ndarray, **make.operators()),
            mock.patch.multiple(
                cupy,
                sqrt=lambda x: make.elementwise(np.sqrt, x),
                copyto=like(cupy.copyto, make.copyto),
                ElementwiseKernel=make.kernel,
                get_default_memory_pool=like(cupy.get_default_memory_pool, make.pool),
            ),
            mock.patch.object(cupy.random, "rand", make.rand),
            mock.patch.multiple(
                cupy.cuda.runtime,
                getDeviceProperties=lambda device: dict(PROPERTIES),
                deviceGetPCIBusId=lambda device: BUS,
            ),
        ):
            stack.enter_context(patched)
        yield


def like(real: Any, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """The stand-in, called with arguments that the real one would take."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def call(*arguments: Any, **named: Any) -> Any:
        signature.bind(*arguments, **named)
        return stand_in(*arguments, **named)

    return call


class Maker:
    """Makes the stand-ins. As on a GPU, results are allocated at once, and worked out when the stream comes to it."""

    def __init__(self, machine: Any, seen: Callable[[Any], np.ndarray]) -> None:
        self.machine, self.seen = machine, seen

    def elementwise(self, function: Callable[..., Any], *operands: Any) -> Any:
        import cupy

        views = [self.seen(x) if isinstance(x, cupy.ndarray) else x for x in operands]
        with np.errstate(all="ignore"):
            template = function(*(np.ones_like(x) if isinstance(x, np.ndarray) else x for x in views))
        made = cupy.empty(template.shape, template.dtype)
        self.give(lambda: function(*views), made)
        return made

    def give(self, work: Callable[[], Any], to: Any) -> None:
        """Later: put what ``work`` returns into an array."""
        view = self.seen(to)

        def run() -> None:
            with np.errstate(all="ignore"):
                view[...] = work()

        self.machine.current_stream().give(run)

    def operators(self) -> dict[str, Callable[..., Any]]:
        made: dict[str, Callable[..., Any]] = {}
        for name in OPERATORS:
            function = getattr(operator, name)
            made[f"__{name}__"] = lambda self_, x, function=function: self.elementwise(function, self_, x)
            if name != "gt":
                made[f"__r{name}__"] = lambda self_, x, function=function: self.elementwise(function, x, self_)
                made[f"__i{name}__"] = lambda self_, x, function=function: self.in_place(function, self_, x)
        return made

    def in_place(self, function: Callable[..., Any], to: Any, x: Any) -> Any:
        import cupy

        view, other = self.seen(to), self.seen(x) if isinstance(x, cupy.ndarray) else x
        self.give(lambda: function(view, other), to)
        return to

    def copyto(self, dst: Any, src: Any) -> None:
        source = self.seen(src)
        assert (dst.dtype, dst.shape) == (src.dtype, src.shape)
        self.give(lambda: source, dst)

    def rand(self, *size: int) -> Any:
        import cupy

        made = cupy.empty(size, float)
        self.give(lambda: np.random.default_rng(0).random(size), made)
        return made

    def pool(self) -> Any:
        """CuPy's pool as far as it is asked; that the real one has these methods is looked up."""
        from cupy.cuda import MemoryPool

        return SimpleNamespace(**{MemoryPool.free_all_blocks.__name__: lambda: None})

    def kernel(self, in_params: str, out_params: str, operation: str, name: str) -> Callable[..., None]:
        """``cupy.ElementwiseKernel`` of one type T, whose operation is as good Python as C++."""
        names = [word.removeprefix("T ") for word in f"{in_params}, {out_params}".split(", ")]
        code = compile(operation.replace(";", "\n").replace("\n ", "\n"), name, "exec")

        def run(*arguments: Any) -> None:
            import cupy

            values = dict(zip(names, arguments, strict=True))
            assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
            seen = {key: self.seen(v) if isinstance(v, cupy.ndarray) else v for key, v in values.items()}
            self.machine.current_stream().give(lambda: exec(code, {"sqrt": np.sqrt}, dict(seen)))

        return run
