"""CUDA's devices, streams, events and graphs on the host, with CuPy's names and arguments.

Work waits in the queue of its stream and runs when somebody waits for it: for the stream, the device, or an event.
So what is read too early is seen to be old, and what nothing keeps in order runs in another order than it was asked
for. As with CUDA, the default stream waits for the blocking ones of its device and they for it, work that is captured
goes to a graph instead, and whatever would wait or copy to the host during a capture is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

Work = Callable[[], None]


class Queue:
    """Work of one stream, in order."""

    def __init__(self, lock: Any, *, blocking: bool) -> None:
        self._lock = lock
        self.blocking = blocking  # whether the default stream and it wait for each other
        self._work: deque[Work] = deque()
        self.given = self.done = 0  # how many pieces so far

    def append(self, work: Work) -> None:
        with self._lock:
            self._work.append(work)
            self.given += 1

    def run(self, until: int | None = None) -> None:
        """Carry out the first ``until`` pieces, or all."""
        with self._lock:
            until = self.given if until is None else until
            while self.done < until:
                try:
                    self._work.popleft()()
                finally:
                    self.done += 1

    def end(self) -> Work:
        """Work for another queue: to wait for what this one has been given by now."""
        given = self.given
        return lambda: self.run(given)


class Machine:
    """Any number of devices. Which one is current, and which stream of each, every thread has for itself.

    ``Device``, ``Stream`` and ``Event`` are to take the place of CuPy's classes.
    """

    def __init__(self, devices: int) -> None:
        self.count = devices
        self.quiet = False  # refuses what waits, and what allocates
        self.graphs = 0  # that were ever captured
        self.lock = threading.RLock()
        self.handles = itertools.count(0x1000, 0x10)
        self.default = [Queue(self.lock, blocking=False) for _ in range(devices)]
        self.others: list[list[Queue]] = [[] for _ in range(devices)]
        self.capturing: list[Stream] = []
        self._here = threading.local()
        self.Device: Any = type("Device", (Device,), {"machine": self})
        self.Event: Any = type("Event", (Event,), {"machine": self})
        self.Stream: Any = type("Stream", (Stream,), {"machine": self})
        self.Stream.null, self.Stream.ptds = self.Stream(null=True), self.Stream(ptds=True)

    @property
    def device(self) -> int:
        """The current one."""
        return getattr(self._here, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        if not 0 <= number < self.count:
            raise RuntimeError(f"cudaErrorInvalidDevice: invalid device ordinal ({number} of {self.count})")
        self._here.device = number

    def streams(self, device: int) -> list[Stream]:
        """The streams of a device that ``with`` blocks have made current, the innermost last."""
        if not hasattr(self._here, "streams"):
            self._here.streams = [[self.Stream.null] for _ in range(self.count)]
        return self._here.streams[device]

    def new_queue(self, device: int, *, blocking: bool) -> Queue:
        queue = Queue(self.lock, blocking=blocking)
        self.others[device].append(queue)
        return queue

    def default_of_thread(self, device: int) -> Queue:
        if not hasattr(self._here, "defaults"):
            self._here.defaults = {}
        if device not in self._here.defaults:
            self._here.defaults[device] = self.new_queue(device, blocking=True)
        return self._here.defaults[device]

    def current_stream(self, device_id: int = -1) -> Stream:
        return self.streams(self.device if device_id == -1 else device_id)[-1]

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[Stream]:
        """Make a device the current one; its current stream."""
        with self.Device(device):
            yield self.current_stream()

    def refuse_in_capture(self, what: str) -> None:
        if self.current_stream().is_capturing():
            raise RuntimeError(f"the current stream is capturing, so {what} is disallowed")

    def refuse_in_quiet(self, what: str) -> None:
        assert not self.quiet, f"{what} in a step that may neither wait nor allocate"

    def synchronize(self, device: int | None = None) -> None:
        """Wait for all of a device, or of all devices."""
        for number in range(self.count) if device is None else (device,):
            if any(stream.device == number for stream in self.capturing):
                raise RuntimeError("cudaErrorStreamCaptureUnsupported: a stream of the device is being captured")
            for queue in (self.default[number], *self.others[number]):
                queue.run()

    @property
    def idle(self) -> bool:
        """Whether no work is left, nor can come from a graph."""
        queues = [*self.default, *(queue for queues in self.others for queue in queues)]
        return not self.graphs and all(queue.given == queue.done for queue in queues)


class Device:
    machine: ClassVar[Machine]

    def __init__(self, device: Any = None) -> None:
        self.id = self.machine.device if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        self._before.append(self.machine.device)
        self.machine.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.device = self._before.pop()

    def use(self) -> Device:
        self.machine.device = self.id
        return self

    def synchronize(self) -> None:
        self.machine.refuse_in_quiet("Device.synchronize")
        self.machine.synchronize(self.id)

    @property
    def compute_capability(self) -> str:
        return "90"


class Event:
    machine: ClassVar[Machine]

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.machine.refuse_in_quiet("Event()")
        self.device, self.timed = self.machine.device, not disable_timing
        self._queue: Queue | None = None
        self._number = 0
        self._captured: Graph | None = None
        self.time: float | None = None  # at which it was reached

    def record(self, stream: Stream | None = None) -> None:
        stream = self.machine.current_stream() if stream is None else stream
        if stream.device != self.device:
            raise RuntimeError("cudaErrorInvalidResourceHandle: event and stream are of two devices")
        self._captured, self.time = stream.graph, None
        if stream.graph is None:
            stream.give(self._reached)
            self._queue, self._number = stream.queue, stream.queue.given

    def _reached(self) -> None:
        self.time = time.perf_counter()

    @property
    def done(self) -> bool:
        self._refuse_captured()
        return self._queue is None or self._queue.done >= self._number

    def synchronize(self) -> None:
        self.machine.refuse_in_quiet("Event.synchronize")
        self.reach()

    def reach(self) -> None:
        self._refuse_captured()
        if self._queue is not None:
            self._queue.run(self._number)

    def waiting(self, graph: Graph | None) -> Work:
        """Work that waits for what is recorded now, for a stream that records into this graph, or into none."""
        if self._captured is not graph:
            what = "StreamCaptureIsolation: it waits for work outside" if graph else "CapturedEvent: it was recorded in"
            raise RuntimeError(f"cudaError{what} of its capture")
        if graph is not None or self._queue is None:
            return lambda: None
        queue, number = self._queue, self._number
        return lambda: queue.run(number)

    def _refuse_captured(self) -> None:
        if self._captured is not None:
            raise RuntimeError("cudaErrorCapturedEvent: the event was last recorded in a capturing stream")


def elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds between two events."""
    if not (start.timed and end.timed) or start.time is None or end.time is None:
        raise RuntimeError("cudaErrorInvalidResourceHandle or cudaErrorNotReady: no times of these events")
    return (end.time - start.time) * 1e3


class Stream:
    machine: ClassVar[Machine]
    null: ClassVar[Stream]
    ptds: ClassVar[Stream]

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.graph: Graph | None = None  # what is being captured
        self.is_non_blocking = non_blocking
        self.device_id, self.ptr = -1, 0 if null else 2
        if not null and not ptds:
            self.machine.refuse_in_quiet("Stream()")
            self.device_id, self.ptr = self.machine.device, next(self.machine.handles)
            self._queue = self.machine.new_queue(self.device_id, blocking=not non_blocking)

    @property
    def device(self) -> int:
        return self.machine.device if self.device_id == -1 else self.device_id

    @property
    def queue(self) -> Queue:
        if self.device_id != -1:
            return self._queue
        return self.machine.default_of_thread(self.device) if self.ptr else self.machine.default[self.device]

    def _refuse_implicit(self) -> None:
        """The default stream cannot wait for blocking streams while one of them is captured."""
        if self.queue is self.machine.default[self.device] and any(
            stream.device == self.device and not stream.is_non_blocking for stream in self.machine.capturing
        ):
            raise RuntimeError("cudaErrorStreamCaptureImplicit: a blocking stream is being captured")

    def give(self, work: Work) -> None:
        self._refuse_implicit()
        if self.graph is not None:
            self.graph.work.append(work)
            return
        with self.machine.lock:
            own, default = self.queue, self.machine.default[self.device]
            others = self.machine.others[self.device] if own is default else [default] if own.blocking else []
            for queue in others:
                if (queue.blocking or queue is default) and queue.done < queue.given:
                    own.append(queue.end())
            own.append(work)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.ptr == self.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __enter__(self) -> Stream:
        self._check_device()
        self.machine.streams(self.device).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.streams(self.device).pop()

    def use(self) -> Stream:
        self._check_device()
        self.machine.streams(self.device)[-1] = self
        return self

    def _check_device(self) -> None:
        if self.device != self.machine.device:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device}) does not match with the current device "
                f"({self.machine.device})"
            )

    @property
    def done(self) -> bool:
        return self.queue.done == self.queue.given

    def synchronize(self) -> None:
        self.machine.refuse_in_quiet("Stream.synchronize")
        if self.graph is not None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: the stream is being captured")
        self.queue.run()

    def record(self, event: Event | None = None) -> Event:
        event = self.machine.Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.give(event.waiting(self.graph))

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.graph is not None:
            raise RuntimeError("cudaErrorIllegalState: the stream is being captured already")
        self.graph = Graph(self)
        self.machine.graphs += 1
        self.machine.capturing.append(self)

    def end_capture(self) -> Graph:
        if self.graph is None:
            raise RuntimeError("cudaErrorIllegalState: the stream is not being captured")
        graph, self.graph = self.graph, None
        self.machine.capturing.remove(self)
        return graph

    def is_capturing(self) -> bool:
        self._refuse_implicit()
        return self.graph is not None


class Graph:
    """What was captured, to be carried out again and again."""

    def __init__(self, stream: Stream) -> None:
        self.device, self.machine = stream.device, stream.machine
        self.work: list[Work] = []

    def launch(self, stream: Stream | None = None) -> None:
        stream = self.machine.current_stream() if stream is None else stream
        if stream.device != self.device:
            raise RuntimeError("cudaErrorInvalidValue: the graph is of another device than the stream")
        for work in self.work:
            stream.give(work)

    def upload(self, stream: Stream | None = None) -> None:
        """Nothing to do."""
