"""The CUDA engine emulated on the host: what can go wrong before a kernel runs, and what only an emulation shows."""

import gc
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cuda_host.emulated import EmulatedGPU, emulated_cupy, emulated_gpu, like
from cuda_host.host_kernel import HostModule, Memory, host_memory, missing, run_sanitized, to_numpy
from cuda_host.steps import GPU, alike, capture_and_replay, follow, trees
from helpers import assert_same_bits, assert_same_tree, make_optimizer, traced

from xpoptim.arrays.leaves import pairs
from xpoptim.codegen.cuda import elementwise as text
from xpoptim.engines.cuda import driver, nvrtc
from xpoptim.engines.cuda import plan as cuda
from xpoptim.trace.sums import CHUNK

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import cupy  # after ml_dtypes, which `helpers` has imported: so it knows bfloat16

THERE_IS_A_GPU = cupy.cuda.is_available()
BOTH_ORDERS = pytest.mark.parametrize("backward", [False, True])


@pytest.fixture
def gpu() -> Iterator[EmulatedGPU]:
    with emulated_gpu() as emulated:
        yield emulated


@BOTH_ORDERS
def test_both_orders_of_threads(backward: bool) -> None:
    with emulated_gpu(backward=backward) as gpu:
        params = trees({"float32": np.dtype(np.float32)}, special=0)
        gradients = [alike(params, seed=step, special=0) for step in range(1, 4)]
        follow(gpu, lambda: make_optimizer("Adam", clip_norm=0.5), params, gradients)
        assert gpu.take() == ["sums", "fold", "prologue", "update"] * 3


@BOTH_ORDERS
def test_norm_of_a_large_tensor(backward: bool) -> None:
    """More chunks than a block folds in one round."""
    with emulated_gpu(backward=backward) as gpu, mock.patch.multiple(text, FOLD_THREADS=4, FOLD_EACH=2):
        rng = np.random.default_rng(0)
        params = {"W": np.zeros(4096 * 67 + 5), "b": np.zeros(3)}
        grads = {key: rng.standard_normal(p.shape) for key, p in params.items()}
        follow(gpu, lambda: make_optimizer("SGD", clip_norm=0.1), params, [grads] * 2)


def test_indices_beyond_32_bits() -> None:
    """A chunk far behind the beginning of its row: as if the tensor had 16 thousand million elements."""
    far, size, n = 4_000_000, 4096, 1000
    update = traced(make_optimizer("SGD")).programs("float32", "float32")["update"]
    norm = traced(make_optimizer("SGD", clip_norm=1.0)).programs("float32", "float32")["norm"]
    with host_memory():
        p, g, out = like(np.full(n, 3, np.float32)), like(np.full(n, 2, np.float32)), like(np.zeros(1))
        for program, name in ((update, "update"), (norm, "sums")):
            source = (text.update_source if name == "update" else text.norm_source)(program, 8)
            elements = far * (size if name == "update" else CHUNK)
            table = np.zeros(1, text.table_dtype(program, 8))
            table["scalars"] = 0.25
            row = table["rows"][0][:1]
            row["p"], row["g"] = ((array.data.ptr - 4 * elements) % 2**64 for array in (p, g))
            row["length"] = elements + n
            row["first"] = 2**32 - far  # the first block's chunk is the row's number `far`
            others = (
                (np.int32(size), np.uint64(0), np.uint64(0)) if name == "update" else (np.uint32(1), np.uint64(0), out)
            )
            HostModule(source).get_function(name)((1,), (text.THREADS,), (table, np.uint32(1), *others))
        assert_same_bits(to_numpy(p), np.full(n, 2.5, np.float32))
        assert to_numpy(out)[0] == 4 * n


# --- what can go wrong


def test_without_nvrtc(gpu: EmulatedGPU) -> None:
    """The error says what to install, and nothing has changed; not even what another dtype's kernel could update."""
    params = {"a": like(np.ones(3, np.float32)), "b": like(np.ones(3))}
    grads = {key: like(gpu.to_numpy(p)) for key, p in params.items()}
    for options in ({}, {"clip_norm": 1.0}, {"capturable": True}):
        opt = make_optimizer("Adam", **options)
        refuse = nvrtc.NVRTCNotFound("install it with pip install '.[cuda13]'")

        def fail_for_double(source: str, *_: Any) -> bytes:
            if "double* p" in source or "float* p" not in source:
                raise refuse  # noqa: B023
            return source.encode()

        with mock.patch.object(nvrtc, "cubin", fail_for_double), pytest.raises(ImportError, match=r"\.\[cuda13\]"):
            opt.update(params, grads)
        assert opt.state == {"step": 0, "slots": {}}
        assert not gpu
        assert_same_tree(gpu.host(params), {"a": np.ones(3, np.float32), "b": np.ones(3)})
        opt.update(params, grads)  # and once it is there, all is well
        assert opt.state["step"] == 1
        params = {"a": like(np.ones(3, np.float32)), "b": like(np.ones(3))}
        gpu.take()
        cuda._functions.clear()


def test_without_nvrtc_the_message_names_the_extra(gpu: EmulatedGPU) -> None:
    opt, params = make_optimizer("SGD"), {"W": like(np.ones(3))}
    with (
        mock.patch.object(nvrtc, "cubin", REAL_CUBIN),
        mock.patch.object(nvrtc, "_version", side_effect=RuntimeError("CuPy failed to load libnvrtc.so.13")),
        pytest.raises(ImportError, match=r"pip install '\.\[cuda13\]'"),
    ):
        opt.update(params, {"W": like(np.ones(3))})
    assert opt.state["step"] == 0
    assert_same_bits(gpu.to_numpy(params["W"]), np.ones(3))


REAL_CUBIN = nvrtc.cubin


def test_without_a_device() -> None:
    """CuPy says so itself; nothing has changed."""
    if THERE_IS_A_GPU:
        pytest.skip("there is a GPU")
    with host_memory():
        params, grads = {"W": like(np.ones(3))}, {"W": like(np.ones(3))}
        for rule in ("SGD", "Adam"):
            opt = make_optimizer(rule)
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
                opt.update(params, grads)
            assert opt.state == {"step": 0, "slots": {}}
            assert_same_bits(to_numpy(params["W"]), np.ones(3))


def test_arguments_of_a_wrong_size_are_seen(gpu: EmulatedGPU) -> None:
    """Each size is compared with the kernel's own: what CuPy would take without a word, and CUDA would misread.

    That of the table when the kernel is compiled, by itself.
    """
    params, grads = {"W": like(np.ones(3))}, {"W": like(np.ones(3))}
    row = text.row_dtype
    with (
        mock.patch.object(text, "row_dtype", lambda program: np.dtype([*row(program).descr, ("more", np.uint64)])),
        pytest.raises(RuntimeError, match="static assertion failed"),
    ):
        make_optimizer("SGD").update(params, grads)
    with (
        mock.patch.object(cuda.np, "int32", np.int64),
        pytest.raises(TypeError, match="argument 2 of kernel update is of 8 bytes, its parameter of 4"),
    ):
        make_optimizer("SGD").update(params, grads)


def test_cupy_takes_the_arguments(gpu: EmulatedGPU) -> None:
    """CuPy turns them into parameters before it calls the driver, which is as far as it gets without one."""
    if THERE_IS_A_GPU:
        pytest.skip("there is a GPU, and tests/gpu launches on it")
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    calls, launched = [], driver.launch

    def launch(kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            function((grid,), (block,), arguments, stream=SimpleNamespace(ptr=0))
        launched(kernel, grid, block, arguments)
        calls.append(kernel.name)

    params = {f"{i}": np.ones(5 * (i % 9 == 0), np.float32) for i in range(700)}
    with mock.patch.object(driver, "launch", launch):
        follow(gpu, lambda: make_optimizer("Adam", clip_norm=1.0), params, [params] * 2)
    assert set(calls) == {"upload", "sums_many", "fold_many", "prologue", "update_many"}
    with pytest.raises(TypeError):  # the comparison can fail
        function((1,), (1,), ("no argument",), stream=SimpleNamespace(ptr=0))


def test_a_cubin_that_the_driver_refuses() -> None:
    class Refused(Exception):
        pass

    class Module:
        def load(self, image: bytes) -> None:
            raise Refused("CUDA_ERROR_NO_BINARY_FOR_GPU")

    with (
        mock.patch.object(cupy.cuda.function, "Module", Module),
        mock.patch.object(cupy.cuda.driver, "CUDADriverError", Refused),
        mock.patch.object(cupy.cuda.runtime, "driverGetVersion", return_value=12040),
        mock.patch.object(nvrtc, "version", return_value=(13, 0)),
        pytest.raises(RuntimeError, match=r"the driver, of CUDA 12.4, refused a kernel that NVRTC 13.0 .* for sm_90"),
    ):
        driver.load(b"image", "sm_90")


def test_tensors_too_large_for_one_launch(gpu: EmulatedGPU) -> None:
    """Their chunks must be countable in 31 bits."""
    huge = SimpleNamespace(data=SimpleNamespace(ptr=0))
    leaves = pairs({"W": huge}, {"W": huge})
    leaves[0].p = huge
    program = traced(make_optimizer("SGD")).programs("float32", "float32")["update"]
    assert cuda._fill(cuda._Table(program, 0, 1), leaves, [(2**31 - 1) * 1024], 1024) == 2**31 - 1
    for length in ((2**31 - 1) * 1024 + 1, 2**31 * 1024):
        with pytest.raises(ValueError, match=r"params\['W'\] and its like have more elements than one launch can take"):
            cuda._fill(cuda._Table(program, 0, 1), leaves, [length], 1024)


# --- what the tests ask of a real GPU


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[GPU]:
    """What tests/gpu puts around a real GPU, around emulated ones: no slip in it waits for a machine that has one."""
    monkeypatch.syspath_prepend(Path(__file__).with_name("gpu"))
    import real_gpu

    monkeypatch.setattr(real_gpu.RealGPU, "busy", EmulatedGPU.busy)  # its kernel is not for a host
    with emulated_cupy(), real_gpu.real_gpu() as gpu:
        yield gpu


def test_captures_on_what_stands_for_a_real_gpu(real: GPU) -> None:
    params = trees({"float16": np.dtype(np.float16)}, ((33, 41), (0,)), special=0)
    make = partial(make_optimizer, "Adam", clip_norm=0.5, capturable=True)
    capture_and_replay(real, make, params, lay=np.asfortranarray)


def test_devices_of_what_stands_for_a_real_gpu(real: GPU) -> None:
    def place(gpu: GPU, values: np.ndarray, number: int) -> Any:
        return gpu.array(values[::-1].copy()[::-1], device=number % 2)

    params = trees({"float32": np.dtype(np.float32)}, ((7, 9), (5,), (4099,)), special=0)
    make, gradients = partial(make_optimizer, "Momentum"), [alike(params, seed=step, special=0) for step in range(3)]
    follow(real, make, params, gradients, place=place, place_gradient=place)
    assert set(real.devices) == {0, 1}
    assert set(real.take()) == {"update", "copy"}


def test_what_a_real_gpu_may_not_do_in_a_quiet_step(real: GPU) -> None:
    x = real.array(np.ones(3))
    assert real.busy(real.stream).done is False
    for work in (
        lambda: driver.event(),
        lambda: driver.new_stream(),
        lambda: driver.synchronize(0),
        lambda: driver.zeros(3, float),
        lambda: driver.to_host(x),
        lambda: driver.upload(x, np.ones(3)),
    ):
        with real.quiet(), pytest.raises(AssertionError, match="may not wait"):
            work()


# --- the emulation itself


def test_memory_of_garbage_in_a_cycle(gpu: EmulatedGPU) -> None:
    """It stays while work waits, which may have its address, as other memory does."""
    import cupy

    cycles: list[Any] = [[cupy.zeros(1000)] for _ in range(100)]
    addresses = {cycle[0].data.ptr for cycle in cycles}
    for cycle in cycles:
        cycle.append(cycle)
    del cycles, cycle
    gc.collect()
    others = [Memory(8000) for _ in range(100)]
    assert addresses.isdisjoint(other.address for other in others)
    gpu.machine.synchronize()


# --- sanitizers


def test_under_sanitizers() -> None:
    """Again with kernels that AddressSanitizer and UBSan watch: nothing beyond an array, nothing undefined."""
    engine = Path(__file__).with_name("test_cuda_engine.py")
    biting = "small_but_complete or indices_beyond or (aligned_in_its_own_way and float32)"
    done = run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", biting, __file__, str(engine))
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert re.search(r"\b4 passed", report), report
    assert "skipped" not in report, report
