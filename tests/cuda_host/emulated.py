"""The CUDA engine on a machine without a GPU: its own text, compiled for the host, on host-backed CuPy arrays.

Of the engine only the loading of a module is replaced; of CuPy what would ask the driver: devices, streams, events and
graphs, which are those of `queues`, and the functions that make, fill or copy arrays. So an array is made on the
current device, as CuPy does it, and work on arrays of another device is refused, as CuPy does it where one device
cannot reach the other's memory. Work runs when it is waited for: `EmulatedGPU.host` waits, a look at memory does not.
What needs time, and kernels of CuPy's own, cannot be seen here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from xpoptim.engines.cuda import driver, nvrtc
from xpoptim.engines.cuda import plan as cuda

from . import host_kernel
from .host_kernel import HostKernel, HostModule, Memory
from .queues import Machine, elapsed_time
from .steps import GPU


class EmulatedGPU(GPU):
    """Any number of GPUs, of which one is the current one."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.stream = machine.Stream(non_blocking=True)

    def array(self, values: Any, offset: int = 0, device: int = 0) -> Any:
        array = like(values, offset, device)
        with self.machine.on(device) as stream:  # as with a transfer that is waited for
            stream.queue.run()
        return array

    def to_numpy(self, array: Any) -> np.ndarray:
        self.machine.synchronize()
        return host_kernel.to_numpy(array)

    def fill(self, array: Any, values: Any) -> None:
        with self.machine.on(array.data.device_id):
            _give_assignment(self.machine, array, values)

    def busy(self, stream: Any) -> Any:
        return stream.record()  # anything takes until it is waited for

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        self.machine.quiet = True
        try:
            yield
        finally:
            self.machine.quiet = False


@contextlib.contextmanager
def emulated_gpu(*, devices: int = 2, backward: bool = False) -> Iterator[EmulatedGPU]:
    """Run the CUDA engine on the host; ``backward`` runs threads and blocks in descending order.

    The current stream is ``gpu.stream``. All work has been done at the end.
    """
    with emulated_cupy(devices=devices, backward=backward) as machine:
        gpu = EmulatedGPU(machine)
        with gpu.recorded(), gpu.stream:
            yield gpu


@contextlib.contextmanager
def emulated_cupy(*, devices: int = 2, backward: bool = False) -> Iterator[Machine]:
    """CuPy and the engine over a host that takes the place of GPUs, with the default streams current."""
    global _machine
    machine = _machine = Machine(devices)
    try:
        with _patches(machine, backward):
            yield machine
            machine.synchronize()
    finally:
        _machine = None
        _left.clear()


@contextlib.contextmanager
def _patches(machine: Machine, backward: bool) -> Iterator[None]:
    import cupy

    def load(image: bytes, arch: str) -> Any:
        return _Module(machine, HostModule(image.decode(), backward=backward))

    def allocate(size: int) -> Any:
        machine.refuse_in_quiet(f"an allocation of {size} bytes")
        return _allocate(size, machine.device)

    before, set_allocator = cupy.cuda.get_allocator(), cupy.cuda.set_allocator
    with contextlib.ExitStack() as stack:
        for patched in (
            mock.patch.multiple(driver, load=load, architecture=lambda device: "sm_90"),
            mock.patch.object(nvrtc, "cubin", lambda source, arch, options=(): source.encode()),
            mock.patch.object(cuda, "_functions", {}),
            mock.patch.multiple(cupy, **_functions(machine)),
            mock.patch.multiple(cupy.ndarray, **_methods(machine)),
            mock.patch.multiple(
                cupy.cuda,
                Device=machine.Device,
                Stream=machine.Stream,
                Event=machine.Event,
                get_current_stream=machine.current_stream,
                get_elapsed_time=elapsed_time,
                is_available=lambda: True,
                set_allocator=lambda allocator=None: None,
            ),
            mock.patch.multiple(
                cupy.cuda.runtime,
                getDevice=lambda: machine.device,
                getDeviceCount=lambda: machine.count,
                deviceSynchronize=lambda: machine.Device().synchronize(),
            ),
        ):
            stack.enter_context(patched)
        set_allocator(allocate)
        stack.callback(set_allocator, before)
        yield


class _Module:
    def __init__(self, machine: Machine, module: HostModule) -> None:
        self._machine, self._module = machine, module

    def get_function(self, name: str) -> _Function:
        return _Function(self._machine, self._module.get_function(name))


class _Function:
    """A kernel that is launched on the current stream of the current device, which has to be that of its arrays."""

    def __init__(self, machine: Machine, kernel: HostKernel) -> None:
        self.name = kernel.name
        self._machine, self._kernel = machine, kernel

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, stream: Any = None) -> None:
        import cupy

        _refuse_elsewhere(self._machine, self.name, *(a for a in args if isinstance(a, cupy.ndarray)))
        stream = self._machine.current_stream() if stream is None else stream
        stream.give(self._kernel.prepared(grid, block, args))


# --- what takes the place of CuPy's functions and methods: they allocate at once, and work when the stream comes to it


def _functions(machine: Machine) -> dict[str, Callable[..., Any]]:
    import cupy

    def full(shape: Any, value: Any, dtype: Any = None, order: str = "C") -> Any:
        return filled(np.empty(shape, np.asarray(value).dtype if dtype is None else dtype, order), value)

    def full_like(a: Any, value: Any, dtype: Any = None, order: str = "K") -> Any:
        return filled(np.empty_like(seen(a), dtype, order=order), value)

    def filled(template: np.ndarray, value: Any) -> Any:
        new = _made(template)
        _give_assignment(machine, new, value)
        return new

    def array(a: Any, dtype: Any = None, copy: bool | None = True, order: str = "K", **_: Any) -> Any:
        if not isinstance(a, cupy.ndarray):
            machine.refuse_in_capture("a transfer from the host")
            machine.refuse_in_quiet("a transfer from the host")
            values = np.array(a, dtype, order=order)
            return filled(np.empty_like(values), values)
        _refuse_elsewhere(machine, "array", a)
        return a if not copy and dtype in (None, a.dtype) else a.astype(a.dtype if dtype is None else dtype, order)

    def ascontiguousarray(a: Any, dtype: Any = None) -> Any:
        same = isinstance(a, cupy.ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype)
        return a if same else array(a, dtype, order="C")

    return {
        "zeros": lambda shape, dtype=float, order="C": full(shape, 0, dtype, order),
        "ones": lambda shape, dtype=float, order="C": full(shape, 1, dtype, order),
        "full": full,
        "zeros_like": lambda a, dtype=None, order="K": full_like(a, 0, dtype, order),
        "ones_like": lambda a, dtype=None, order="K": full_like(a, 1, dtype, order),
        "full_like": full_like,
        "array": array,
        "asarray": lambda a, dtype=None, order="K", **_: array(a, dtype, None, order),
        "ascontiguousarray": ascontiguousarray,
        "asnumpy": lambda a, stream=None, **_: a.get(stream) if isinstance(a, cupy.ndarray) else np.asarray(a),
    }


def _methods(machine: Machine) -> dict[str, Callable[..., Any]]:
    def get(self: Any, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        stream = machine.current_stream() if stream is None else stream
        machine.refuse_in_quiet("a transfer to the host")
        _refuse_elsewhere(machine, "get", self)
        if stream.is_capturing():
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
        source = seen(self)
        to = np.empty_like(source, order=order) if out is None else out
        stream.give(lambda: _assign(to, source))
        if blocking:
            stream.synchronize()
        return to

    def set_(self: Any, values: np.ndarray, stream: Any = None) -> None:
        assert (self.dtype, self.shape) == (values.dtype, values.shape)
        stream = machine.current_stream() if stream is None else stream
        machine.refuse_in_quiet("a transfer from the host")
        _refuse_elsewhere(machine, "set", self)
        if stream.is_capturing():
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        to, staged = seen(self), values.copy()
        stream.give(lambda: _assign(to, staged))

    def astype(self: Any, dtype: Any, order: str = "K", copy: bool = True, **_: Any) -> Any:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        _refuse_elsewhere(machine, "astype", self)
        new = _made(np.empty_like(seen(self), dtype, order=order))
        _give_assignment(machine, new, self)
        return new

    def assign(self: Any, index: Any, value: Any) -> None:
        _give_assignment(machine, self[index], value)

    def deepcopy(self: Any, memo: Any) -> Any:
        with machine.Device(self.data.device_id):
            return self.copy()

    def reduce(self: Any) -> Any:
        return from_host, (get(self, order="A"),)

    return {
        "get": get,
        "set": set_,
        "astype": astype,
        "copy": lambda self, order="C": astype(self, self.dtype, order),
        "fill": lambda self, value: _give_assignment(machine, self, value),
        "__setitem__": assign,
        "__copy__": lambda self: self.copy(),
        "__deepcopy__": deepcopy,
        "__reduce__": reduce,
    }


def from_host(values: np.ndarray) -> Any:
    """An array on the current device; here for pickles, which refer to it by its name."""
    import cupy

    return cupy.array(values)


def _made(template: np.ndarray) -> Any:
    """An array on the current device, of the template's shape, dtype and strides."""
    import cupy

    return cupy.ndarray(template.shape, template.dtype, cupy.cuda.alloc(template.nbytes), template.strides)


def _give_assignment(machine: Machine, array: Any, value: Any) -> None:
    import cupy

    on_device = isinstance(value, cupy.ndarray)
    _refuse_elsewhere(machine, "an assignment", array, *([value] if on_device else []))
    to, values = seen(array), seen(value) if on_device else np.array(value)
    machine.current_stream().give(lambda: _assign(to, values))


def _assign(to: np.ndarray, values: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        to[...] = values


def _refuse_elsewhere(machine: Machine, what: str, *arrays: Any) -> None:
    for array in arrays:
        assert array.data.device_id == machine.device, (
            f"{what} on device {machine.device} is given memory of device {array.data.device_id}"
        )


# --- arrays


def like(values: np.ndarray, offset: int = 0, device: int = 0) -> Any:
    """A CuPy array with the values, strides and all, ``offset`` bytes beyond a multiple of 512, as if transferred."""
    import cupy

    values = np.asarray(values)
    low, high = np.lib.array_utils.byte_bounds(values) if values.size else (values.ctypes.data, values.ctypes.data)
    room = _allocate(high - low + offset, device) + offset
    ctypes.memmove(room.ptr, low, high - low)
    return cupy.ndarray(values.shape, values.dtype, room + (values.ctypes.data - low), values.strides)


def seen(array: Any) -> np.ndarray:
    """The memory of a host-backed CuPy array as a NumPy array of the same strides, to be read and written.

    As it is now: what a stream has still to do is not in it. Nor does it keep the memory.
    """
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    interface = {
        "version": 3,
        "shape": array.shape,
        "typestr": np.dtype((np.void, array.itemsize)).str,  # dtypes of other packages have no typestr
        "strides": array.strides,
        "data": (array.data.ptr, False),
    }
    view = np.asarray(SimpleNamespace(__array_interface__=interface)).view(array.dtype)
    assert view.ctypes.data == array.data.ptr
    return view


_machine: Machine | None = None  # that is emulated now
_left: list[Memory] = []  # given back while work was waiting, which may have the address


class _Lent(Memory):
    """Memory of a device. It goes back to the stream that it was taken in, as to CuPy's pool, and what that stream
    does with it next, here to fill it with NaN, waits for no other stream.
    """

    def __init__(self, size: int, device: int) -> None:
        super().__init__(size)
        self._size, self._machine, self._queue = size, _machine, None
        if _machine is not None:
            with _machine.on(device) as stream:
                self._queue = stream.queue

    def __del__(self) -> None:
        if self._queue is None or self._machine is not _machine or self._machine.idle:
            super().__del__()
            return
        # In a new owner's hands: of garbage in a cycle every part is finalized, whatever another part saves.
        _left.append(Memory.of(self.address))
        self._queue.append(functools.partial(ctypes.memset, self.address, 0xFF, self._size))


def _allocate(size: int, device: int) -> Any:
    import cupy

    lent = _Lent(size, device)
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(lent.address, size, lent, device), 0)
