"""Measures a case: all contenders in turns, a row for each, kept after every round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import contenders, dropouts
from .cases import Case, Settings
from .contenders import Contender, NotCaptured
from .device import Lost, attempt, free_memory, one_stream, recover
from .machine import Clock, no_torch, one_line
from .record import Record, Row
from .report import case_table

CONTENDERS = contenders.CONTENDERS | dropouts.CONTENDERS


def measure_all(record: Record, seconds: float) -> None:
    """All cases that are not done, within about so many seconds; each is printed when it is done."""
    clock, end = Clock(), time.perf_counter() + seconds
    todo = [case for case in record.settings.cases() if case.key not in record.done]
    with one_stream() as stream:
        for number, case in enumerate(todo):
            if time.perf_counter() > end:
                print(f"the time is up before: {'; '.join(case.key for case in todo[number:])}", flush=True)
                break
            print(f"\n{case.key}", flush=True)
            share = max(0.5, (end - time.perf_counter()) / (len(todo) - number))
            Measurement(case, record, stream, clock).run(share)
            record.done.append(case.key)
            record.in_work = ["", ""]
            record.save()
            print("\n".join(case_table(record.rows_of(case))), flush=True)


class Measurement:
    """One case. The contenders that take part are kept in ``here``; one that raises leaves it."""

    def __init__(self, case: Case, record: Record, stream: Any, clock: Clock) -> None:
        self.case, self.record, self.stream, self.clock = case, record, stream, clock
        self.settings: Settings = record.settings
        self.rows = {row.contender: row for row in record.rows_of(case)}
        self.here: dict[str, Contender] = {}

    def run(self, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        try:
            self.begin()
            steps = self.warm_up()
            self.read_clock()
            for turn in range(self.settings.most_rounds):
                if (turn >= self.settings.fewest_rounds and time.perf_counter() > deadline) or not self.here:
                    break
                self.round(turn, steps)
            self.read_clock()
            if self.case.total >= self.settings.large:
                self.each(lambda row, contender: setattr(row, "peak_bytes", peak(contender, self.stream)))
            if self.case.total <= self.settings.small:
                self.each(self.device_times)
        finally:
            self.here.clear()
        recover()

    def in_work(self, name: str) -> None:
        self.record.in_work = [self.case.key, name]
        self.record.save()

    def try_(self, name: str, work: Callable[[], Any]) -> Any:
        """`attempt`; one that raises leaves."""
        try:
            found = attempt(self.rows[name], work)
        except Lost as lost:
            print(f"{name}: {self.rows[name].error or 'in a graph'}; the GPU is lost ({lost.reason})", flush=True)
            self.in_work(name if self.rows[name].error else "")
            raise
        if self.rows[name].error:
            print(f"{name}: {self.rows[name].error}", flush=True)
            self.here.pop(name, None)
            free_memory()
        return found

    def each(self, work: Callable[[Row, Contender], Any]) -> None:
        for name in list(self.here):
            self.try_(name, partial(self.on, name, work))

    def on(self, name: str, work: Callable[[Row, Contender], Any]) -> Any:
        """Looks the contender up, so that nothing holds one that has left."""
        return work(self.rows[name], self.here[name])

    def begin(self) -> None:
        """Make the contenders, and compare their first steps with the formula."""
        self.in_work("")
        data: Any = None
        for name, row in self.rows.items():
            if row.error:  # of a process that has ended here
                continue
            row.step_ms, row.host_ms, row.device_ms, row.sm_mhz = [], [], [], []
            kind = CONTENDERS[name]
            row.bytes_per_step = float(kind.traffic * self.case.total)
            row.in_l2 = kind.resident * self.case.total <= self.record.machine["l2_bytes"]
            row.note = kind.missing()
            if row.note:
                continue
            self.in_work(name)
            if data is None:
                data = self.try_(name, self.data)
            if data is not None:
                made = self.try_(name, partial(checked, kind, data))
                if made is not None:
                    self.here[name] = made
        self.in_work("")

    def data(self) -> Any:
        if self.case.kind.startswith("Dropout"):
            return dropouts.Data(self.case)
        return contenders.Data(self.case, self.settings.large)

    def warm_up(self) -> dict[str, int]:
        """Keep the GPU busy until its clock is up; how many steps make a block for each."""
        end, steps = time.perf_counter() + self.settings.warm_up, dict.fromkeys(self.here, 1)
        while self.here:
            self.each(lambda row, contender: block(contender, 1, self.stream))
            if time.perf_counter() >= end:
                break

        def count(row: Row, contender: Contender) -> None:
            took = block(contender, 1, self.stream)
            took = max(took if took > 1 else block(contender, 10, self.stream), 1e-6)
            steps[row.contender] = max(1, min(1000, math.ceil(self.settings.block * 1e3 / took)))

        self.each(count)
        return steps

    def round(self, turn: int, steps: dict[str, int]) -> None:
        """A block of each, in an order that moves on by one."""
        order = list(self.rows)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name in self.here:
                self.try_(name, partial(self.on, name, partial(self.times, steps[name])))
        self.record.save()

    def times(self, steps: int, row: Row, contender: Contender) -> None:
        row.step_ms.append(block(contender, steps, self.stream))
        if row.contender != "copy":
            row.host_ms += [host_time(contender, self.stream) for _ in range(3 if steps > 3 else 1)]

    def device_times(self, row: Row, contender: Contender) -> None:
        """A graph of some steps, so that no host is in the way between them."""
        steps = self.settings.graph_steps
        try:
            launch = contender.graph(steps)
            row.device_ms = [replay(launch, self.stream) / steps for _ in range(5)]
            return
        except NotCaptured as reason:
            row.device_note = str(reason)
            return
        except Exception as error:
            row.device_note = one_line(error)
        recover()

    def read_clock(self) -> None:
        now = self.clock.sm_mhz()
        for name in self.here:
            self.rows[name].sm_mhz.append("unknown" if now is None else now)


def checked(kind: type[Any], data: Any) -> Contender:
    contender = kind(data)
    contender.check()
    return contender


def block(contender: Contender, steps: int, stream: Any) -> float:
    """Milliseconds a step, between two events of the GPU."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    contender.step()  # the GPU has something to do while the first counted step is on its way
    begin.record(stream)
    for _ in range(steps):
        contender.step()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) / steps


def replay(launch: Callable[[], Any], stream: Any) -> float:
    """Milliseconds of a graph."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    launch()  # so that the counted one is on its way before the GPU comes to it
    begin.record(stream)
    launch()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end)


def host_time(contender: Contender, stream: Any) -> float:
    """Milliseconds that a call of ``step`` takes when the GPU has nothing left to do."""
    stream.synchronize()
    start = time.perf_counter()
    contender.step()
    took = time.perf_counter() - start
    stream.synchronize()
    return took * 1e3


def peak(contender: Contender, stream: Any) -> int:
    """The most bytes that a step takes for a while, from CuPy's pool or from torch's."""
    import cupy

    class Watch(cupy.cuda.MemoryHook):
        name = "watch"
        now = most = 0

        def malloc_postprocess(self, **about: Any) -> None:
            self.now += about["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **about: Any) -> None:
            self.now -= about["mem_size"]

    stream.synchronize()
    taken = 0
    with Watch() as watch:
        if no_torch():
            contender.step()
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.step()
            taken = torch.cuda.max_memory_allocated() - before
    stream.synchronize()
    return watch.most + taken
