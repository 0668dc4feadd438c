"""What an optimizer keeps on GPUs is worked on in turn, whatever CUDA streams the work is given to.

Slots, the step count and the memory of plans are used by steps, by copies of a state and by what loads one. Each runs
on the current streams. If that is another stream than the last time, it waits first, on the GPU, for an event that was
recorded behind what came last; the host waits for nothing. What is captured into a graph is not carried out and records
no event, and when a graph is launched is not seen here: so whoever reads waits for the whole GPU from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from ...arrays.types import CuPyArray
from . import driver


class _Last:
    """What came last on the current GPU: its stream, and the event behind it."""

    def __init__(self) -> None:
        self.event = driver.event()
        self.stream: driver.Stream | None = None
        # A stream can be another one in each thread: CuPy has one object for all `ptds`.
        self.thread: threading.Thread | None = None
        self.reader: driver.Stream | None = None  # a stream of our own
        self.streams: weakref.WeakSet[driver.Stream] = weakref.WeakSet()  # all so far

    def is_of(self, stream: driver.Stream) -> bool:
        return stream is self.stream and threading.current_thread() is self.thread

    def record(self, stream: driver.Stream) -> None:
        if not self.is_of(stream):
            self.stream, self.thread = stream, threading.current_thread()
            self.streams.add(stream)
        self.event.record(stream)


class Turns:
    """The order of the work on one optimizer's memory."""

    def __init__(self) -> None:
        self.captured = False  # whether there is a graph with a step
        self.recording = False  # whether the turn is captured into one
        self._last: dict[int, _Last] = {}

    def begin(self, devices: Collection[int]) -> list[int]:
        """What the current streams of these GPUs do from now on comes behind the last turn.

        What is captured is no turn, since it is not carried out now: the GPUs of which there is one to `end`.
        """
        turn = [device for device in devices if not driver.capturing(device)]
        self.recording = len(turn) < len(devices)
        for device in turn:
            last, stream = self._last.get(device), driver.stream(device)
            if last is not None and not last.is_of(stream):
                with driver.on(device):
                    stream.wait_event(last.event)
        return turn

    def end(self, devices: Iterable[int]) -> None:
        """What the current streams have been given by now is the last turn."""
        for device in devices:
            with driver.on(device):
                if device not in self._last:
                    self._last[device] = _Last()
                self._last[device].record(driver.stream(device))

    @contextmanager
    def taken(self, devices: Collection[int]) -> Iterator[None]:
        turn = self.begin(devices)
        try:
            yield
        finally:
            self.end(turn)

    @contextmanager
    def apart(self, what: str, devices: Iterable[int] = ()) -> Iterator[None]:
        """A turn that is no step, on all GPUs that have been worked on, and on these."""
        every = {*devices, *self._last}
        self.refuse(what, every)
        self._await_replays(every)
        with self.taken(every):
            yield
        self._await_replays(every)  # the next replay does not know that it would have to wait

    def read(self, what: str, array: CuPyArray) -> np.ndarray:
        """An array's values after the last turn. Waits for that, and for nothing else that the current stream does."""
        device = array.data.device_id
        self.refuse(what, [device])
        self._await_replays([device])
        last = self._last[device]
        with driver.on(device):
            last.reader = last.reader or driver.new_stream()
            last.reader.wait_event(last.event)
        return driver.to_host(array, last.reader)

    def release(self) -> None:
        """Memory may go back now to the streams that it was taken in, which use it again: after the last turn."""
        for device, last in self._last.items():
            for stream in last.streams:
                if not last.is_of(stream) and not driver.closed(stream):
                    with driver.on(device):
                        stream.wait_event(last.event)

    def refuse(self, what: str, devices: Iterable[int]) -> None:
        if any(map(driver.capturing, devices)):
            raise RuntimeError(
                f"{what} while the current stream is being captured into a CUDA graph: "
                "do it before or after the capture"
            )

    def _await_replays(self, devices: Iterable[int]) -> None:
        if self.captured:
            for device in devices:
                driver.synchronize(device)
