"""The emulated devices, streams, events and graphs: work runs in order when it is waited for, and only then."""

from collections.abc import Iterator

import numpy as np
import pytest
from cuda_host.emulated import EmulatedGPU, emulated_gpu, seen
from cuda_host.host_kernel import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import cupy  # after ml_dtypes, which `cuda_host` has imported: so it knows bfloat16


@pytest.fixture
def gpu() -> Iterator[EmulatedGPU]:
    with emulated_gpu() as emulated:
        yield emulated


def new_stream(*, non_blocking: bool = True) -> cupy.cuda.Stream:
    return cupy.cuda.Stream(non_blocking=non_blocking)


def fill(array: cupy.ndarray, value: float, stream: cupy.cuda.Stream) -> None:
    with stream:
        array.fill(value)


def value(array: cupy.ndarray) -> float:
    """As it is now."""
    return float(seen(array)[0])


def test_work_waits_until_it_is_waited_for(gpu: EmulatedGPU) -> None:
    x = gpu.array(np.zeros(3))
    x[...] = 5.0
    assert value(x) == 0
    assert not gpu.stream.done
    assert x.get().tolist() == [5, 5, 5]
    assert gpu.stream.done


def test_streams_do_not_wait_for_each_other_but_for_events(gpu: EmulatedGPU) -> None:
    x, (first, second) = gpu.array(np.zeros(3)), (new_stream(), new_stream())
    fill(x, 1, first)
    fill(x, 2, second)
    second.synchronize()
    first.synchronize()
    assert value(x) == 1
    event = cupy.cuda.Event(disable_timing=True)
    assert event.done
    fill(x, 3, first)
    event.record(first)
    fill(x, 4, first)
    second.wait_event(event)
    fill(x, 5, second)
    event.record(second)
    assert not event.done
    event.synchronize()
    assert value(x) == 5
    assert not first.done
    gpu.host(x)
    assert value(x) == 4


def test_the_default_stream_waits_for_blocking_ones_and_they_for_it(gpu: EmulatedGPU) -> None:
    x, blocking, null = gpu.array(np.zeros(3)), new_stream(non_blocking=False), cupy.cuda.Stream.null
    fill(x, 1, new_stream())
    fill(x, 2, blocking)
    fill(x, 3, null)
    null.synchronize()
    assert (value(x), blocking.done) == (3, True)
    fill(x, 4, null)
    fill(x, 5, blocking)
    blocking.synchronize()
    assert (value(x), null.done) == (5, True)
    cupy.cuda.runtime.deviceSynchronize()
    assert value(x) == 1


def test_devices(gpu: EmulatedGPU) -> None:
    """Arrays are made on the current one, and nothing is done with those of another."""
    first, second = gpu.array(np.ones(3)), gpu.array(np.ones(3), device=1)
    with cupy.cuda.Device(1):
        assert cupy.zeros_like(first).device.id == cupy.empty(3).device.id == cupy.zeros(3).device.id == 1
        assert second.copy().device.id == 1
        with pytest.raises(AssertionError, match="on device 1 is given memory of device 0"):
            first.copy()
        with pytest.raises(RuntimeError, match="does not match with the current device"), gpu.stream:
            pass
    for work in (
        second.copy,
        second.get,
        lambda: second.fill(0),
        lambda: cupy.array(second),
        lambda: second.astype(int),
    ):
        with pytest.raises(AssertionError, match="on device 0 is given memory of device 1"):
            work()
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"), cupy.cuda.Device(2):
        pass
    event = cupy.cuda.Event()
    with cupy.cuda.Device(1), pytest.raises(RuntimeError, match="event and stream are of two devices"):
        event.record()


def test_memory_goes_back_to_its_own_stream(gpu: EmulatedGPU) -> None:
    """Who works on it in another has to order the two."""
    x, other = gpu.array(np.zeros(3)), new_stream()
    for late in (False, True):
        with other:
            memory = cupy.full(3, 7.0)
        x[...] = memory
        other.synchronize()
        del memory
        if late:
            other.synchronize()
        assert np.isnan(x.get()).all() == late


def test_graphs(gpu: EmulatedGPU) -> None:
    x, y, stream, other = gpu.array(np.zeros(3)), gpu.array(np.zeros(3)), new_stream(), new_stream()
    event = cupy.cuda.Event()
    event.record(stream)
    with stream:
        stream.begin_capture()
        y[...] = x
        refused = (x.get, lambda: x.set(np.ones(3)), lambda: cupy.array(np.ones(3)), stream.synchronize)
        for work in (*refused, cupy.cuda.Device(0).synchronize, lambda: stream.wait_event(event)):
            with pytest.raises(RuntimeError):
                work()
        event.record()
        for work in (event.synchronize, lambda: event.done, lambda: other.wait_event(event)):
            with pytest.raises(RuntimeError, match="cudaErrorCapturedEvent"):
                work()
        graph = stream.end_capture()
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.Stream.null.begin_capture()
    stream.synchronize()
    assert value(y) == 0
    for n, launched_on in ((1, other), (2, stream)):
        fill(x, n, launched_on)
        graph.launch(launched_on)
        assert value(y) == n - 1
        launched_on.synchronize()
        assert value(y) == n


def test_times(gpu: EmulatedGPU) -> None:
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    end.record()
    end.synchronize()
    assert cupy.cuda.get_elapsed_time(begin, end) >= 0
    with pytest.raises(RuntimeError, match="no times"):
        cupy.cuda.get_elapsed_time(cupy.cuda.Event(disable_timing=True), end)


def test_what_a_quiet_step_may_not_do(gpu: EmulatedGPU) -> None:
    x, event = gpu.array(np.zeros(3)), cupy.cuda.Event()
    refused = (x.get, lambda: x.set(np.ones(3)), x.copy, lambda: cupy.empty(3), lambda: cupy.zeros_like(x))
    refused += (cupy.cuda.Event, cupy.cuda.Stream, event.synchronize, gpu.stream.synchronize)
    for work in (*refused, cupy.cuda.Device(0).synchronize):
        with gpu.quiet(), pytest.raises(AssertionError, match="may neither wait nor allocate"):
            work()
    with gpu.quiet():
        event.record()
        gpu.stream.wait_event(event)
        x[...] = 1.0
