"""The contenders of the GPU benchmarks on an emulated device: are they right, and what becomes of one that raises?"""

import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from gpu_records import emulation, start_of
from gpubench import contenders, device, dropouts, machine, measure
from gpubench.cases import EMULATED, Case
from gpubench.record import Record, Row


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulation():
        yield


# --- contenders that raise


def measured(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, **kinds: type) -> dict[str, Row]:
    """The rows of a case in which some contenders are of other kinds."""
    monkeypatch.setattr(
        measure, "CONTENDERS", measure.CONTENDERS | {name.replace("_", " "): kinds[name] for name in kinds}
    )
    record = start_of(tmp_path)
    with device.one_stream() as stream:
        measure.Measurement(case, record, stream, machine.Clock()).run(0.0)
    record.save()
    return {row.contender: row for row in Record.read(record.path).rows}


SMALL = Case("Adam", 3, 50, ("xpoptim", "CuPy kernel", "CuPy code", "copy"))


def raises(error: Callable[[], Exception], when: str, alive: list[Any]) -> type:
    """A contender that raises when it is made, when it is checked, in its next step, or in a round."""

    class Raising(contenders.CupyCode):
        def __init__(self, data: Any) -> None:
            super().__init__(data)
            alive.append(weakref.ref(self))
            self.now = "checking"
            self.fail_in("making")

        def fail_in(self, now: str) -> None:
            if now == when:
                raise error()

        def check(self) -> None:
            super().check()
            self.fail_in("checking")
            self.now = "warming up"

        def step(self) -> None:
            super().step()
            self.fail_in(self.now)

    return Raising


@pytest.mark.parametrize("when", ["making", "checking", "warming up", "timing"])
@pytest.mark.parametrize("kind", ["CuPy's memory", "torch's memory", "any other"])
def test_what_raises_costs_its_own_row(
    kind: str, when: str, emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is given back, and the row holds what it said."""
    import cupy

    if kind == "CuPy's memory":
        error: Any = partial(cupy.cuda.memory.OutOfMemoryError, 1 << 40, 1 << 30)
    elif kind == "torch's memory":
        torch = pytest.importorskip("torch")
        error = partial(torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1 TiB")
    else:
        error = partial(ValueError, "something\nelse")
    alive: list[Any] = []
    held: list[bool] = []  # whenever memory is given back
    free = device.free_memory

    def watched() -> None:
        free()
        held.append(any(ref() is not None for ref in alive))

    begin = measure.Measurement.round

    def timing(self: measure.Measurement, turn: int, steps: dict[str, int]) -> None:
        if "CuPy code" in self.here:
            self.here["CuPy code"].now = "timing"  # type: ignore[attr-defined]
        begin(self, turn, steps)

    monkeypatch.setattr(measure.Measurement, "round", timing)
    monkeypatch.setattr(device, "free_memory", watched)
    monkeypatch.setattr(measure, "free_memory", watched)
    rows = measured(tmp_path, SMALL, monkeypatch, CuPy_code=raises(error, when, alive))
    assert rows["CuPy code"].error == machine.one_line(error())
    assert rows["CuPy code"].median_ms is None
    for name in ("xpoptim", "CuPy kernel", "copy"):
        assert rows[name].error == ""
        assert len(rows[name].step_ms) == EMULATED.fewest_rounds
    assert len(alive) == 1
    assert not held[1]


def test_memory_is_given_back_before_the_next_contender(
    emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one which runs out of memory takes none from those behind it."""
    alive: list[Any] = []
    seen: list[bool] = []

    class Behind(contenders.Copy):
        def __init__(self, data: Any) -> None:
            seen.append(any(ref() is not None for ref in alive))
            super().__init__(data)

    hungry = raises(lambda: MemoryError("no room"), "checking", alive)
    rows = measured(tmp_path, SMALL, monkeypatch, CuPy_code=hungry, copy=Behind)
    assert rows["CuPy code"].error == "MemoryError: no room"
    assert seen == [False]


def test_data_that_cannot_be_made(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender says so, and nothing is raised."""
    monkeypatch.setattr(contenders, "Data", mock.Mock(side_effect=MemoryError("no room")))
    rows = measured(tmp_path, SMALL, monkeypatch)
    assert {row.error for row in rows.values()} == {"MemoryError: no room"}


def test_a_wrong_contender_is_not_timed(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(contenders.CupyKernel):
        def step(self) -> None:
            super().step()
            self.params["W1"][3:4] = 0.5

    rows = measured(tmp_path, SMALL, monkeypatch, CuPy_kernel=Wrong)
    assert "Mismatched elements: 2 / " in rows["CuPy kernel"].error
    assert rows["CuPy kernel"].step_ms == []
    assert rows["xpoptim"].error == ""


def test_a_graph_that_cannot_be_captured(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs the device's time alone; and the stream is as before."""
    import cupy

    class Waiting(contenders.CupyKernel):
        def step(self) -> None:
            super().step()
            if cupy.cuda.get_current_stream().is_capturing():
                raise RuntimeError("it waits")

    rows = measured(tmp_path, SMALL, monkeypatch, CuPy_kernel=Waiting)
    assert rows["CuPy kernel"].error == ""
    assert len(rows["CuPy kernel"].step_ms) == EMULATED.fewest_rounds
    assert rows["CuPy kernel"].device_note == "RuntimeError: it waits"
    assert rows["copy"].device_ms


def test_a_gpu_that_is_lost_ends_the_process(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says who it was, so that the next process leaves it out."""
    import cupy

    lost = RuntimeError("cudaErrorIllegalAddress")  # of one access, and of all that comes after it
    monkeypatch.setattr(cupy.cuda.runtime, "deviceSynchronize", mock.Mock(side_effect=lost))
    with pytest.raises(SystemExit) as ended:
        measured(tmp_path, SMALL, monkeypatch, CuPy_code=raises(lambda: lost, "checking", []))
    assert ended.value.code == device.LOST
    found = Record.read(tmp_path / "found.json")
    assert found.in_work == [SMALL.key, "CuPy code"]
    assert [row.error for row in found.rows if row.error] == ["RuntimeError: cudaErrorIllegalAddress"]


# --- contenders


@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if not name.startswith("torch")])
def test_contenders_follow_the_formula(name: str, emulated: None) -> None:
    """From other starts than those of the check, and with changing gradients afterwards."""
    kind = contenders.CONTENDERS[name]
    for tensors, elements in ((1, 3000), (5, 70)):
        with device.one_stream():
            kind(contenders.Data(Case("Adam", tensors, elements, ()), 10**6)).check()


def test_graphs_of_some_steps(emulated: None) -> None:
    """Each replay is so many steps."""
    with device.one_stream() as stream:
        for name in ("xpoptim, graph", "copy"):
            contender = contenders.CONTENDERS[name](contenders.Data(SMALL, 10**6))
            contender.check()
            launch = contender.graph(4)
            launch()
            launch()
            stream.synchronize()
            if name != "copy":
                contender.compare(3 + 2 * 4)
                assert contender.optimizer.state["step"] == 3 + 2 * 4


def test_gradients_change_from_step_to_step(emulated: None) -> None:
    contender = contenders.Xpoptim(contenders.Data(SMALL, 10**6))
    assert contender.next_grads() is contender.next_grads()
    contender.changing = True
    first, second = contender.next_grads(), contender.next_grads()
    assert first["W0"] is not second["W0"]
    assert contender.next_grads() is first
    assert len(contenders.Data(SMALL, 100).grads) == 1  # of large ones there is room for one set


@pytest.mark.parametrize("name", [name for name in dropouts.CONTENDERS if not name.startswith("torch")])
def test_dropouts_are_checked(name: str, emulated: None) -> None:
    with device.one_stream():
        contender = dropouts.CONTENDERS[name](dropouts.Data(Case("Dropout forward", 1, 3000, ())))
        contender.check()
        if name == "copy":
            return
        wrong = contender.y.copy()
        wrong[7:9] = 0.5
        contender.step = lambda: setattr(contender, "y", wrong)
        with pytest.raises(AssertionError):
            contender.check()


def as_cpu_tensor(array: Any) -> Any:
    """In place of `contenders.as_torch`: in the same memory, on the CPU."""
    import cupy
    import torch
    from cuda_host.emulated import seen

    cupy.cuda.get_current_stream().synchronize()  # of which torch knows nothing here
    tensor = torch.from_numpy(seen(array))
    tensor.memory_of = array
    return tensor


TORCH = {name: kind for name, kind in (contenders.CONTENDERS | dropouts.CONTENDERS).items() if name.startswith("torch")}


@pytest.mark.parametrize("name", TORCH)
def test_torch_contenders_follow_the_formula(name: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors, so that no slip in them waits for a GPU. Graphs are stood in for, with torch's arguments."""
    torch = pytest.importorskip("torch")
    real_graph, steps = torch.cuda.graph, []

    class CUDAGraph:
        """Runs the captured steps again."""

        def replay(self) -> None:
            for _ in range(steps[-1]):
                contender.optimizer.step()

    def graph(*arguments: Any, **named: Any) -> Any:
        bound = inspect.signature(real_graph).bind(*arguments, **named)
        assert isinstance(bound.arguments["cuda_graph"], CUDAGraph)
        return Capturing()

    class Capturing:
        """While torch captures, a step is counted and not taken."""

        def __enter__(self) -> None:
            steps.append(0)
            self.patched = mock.patch.object(contender.optimizer, "step", self.count)
            self.patched.start()

        def count(self) -> None:
            steps[-1] += 1

        def __exit__(self, *_: object) -> None:
            self.patched.stop()

    assert hasattr(torch.cuda.CUDAGraph, "replay")
    monkeypatch.setattr(contenders, "as_torch", as_cpu_tensor)
    monkeypatch.setattr(dropouts, "as_torch", as_cpu_tensor)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    kind = TORCH[name]
    if "capturable" in getattr(kind, "options", {}):
        monkeypatch.setattr(kind, "options", {"fused": True})  # torch refuses the other without CUDA
    case = Case("Adam", 4, 100, ()) if issubclass(kind, contenders.Adam) else Case("Dropout forward", 1, 3000, ())
    data = contenders.Data(case, 10**6) if issubclass(kind, contenders.Adam) else dropouts.Data(case)
    contender = kind(data)
    contender.check()
    if name == "torch fused, graph":
        contender.graph(3)()
        contender.compare(3 + 3)
    else:
        with pytest.raises(contenders.NotCaptured):
            contender.graph(2)


def test_torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch only where it has CUDA."""
    torch = pytest.importorskip("torch")
    for name in ("empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "stream"):
        assert callable(getattr(torch.cuda, name))
    inspect.signature(torch.cuda.ExternalStream.__new__).bind(torch.cuda.ExternalStream, 1)
    optimizer = inspect.signature(torch.optim.Adam)
    for kind in (contenders.Torch, contenders.TorchForeach, contenders.TorchGraph):
        optimizer.bind([], 1e-3, (0.9, 0.99), 1e-7, **kind.options)
    assert str(torch.ops.aten.native_dropout_backward.default._schema).startswith(
        "aten::native_dropout_backward(Tensor grad_output, Tensor mask, float scale)"
    )


# --- the emulated device


def test_slips_show_on_the_emulated_device(emulated: None) -> None:
    """A name that CuPy has not, an argument that it does not take, and a function that is not stood in for."""
    import cupy
    from gpubench.emulated import Maker, like

    a, b = cupy.zeros(3, np.float32), cupy.ones(3, np.float32)
    with pytest.raises(AttributeError):
        cupy.copy_to(a, b)
    with pytest.raises(TypeError, match="src"):
        cupy.copyto(a, source=b)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        cupy.linspace(0, 1, 5)
    with pytest.raises(TypeError):
        like(cupy.copyto, lambda *_: None)(a)
    with pytest.raises(AssertionError):  # of two dtypes, which one T cannot be
        cupy.ElementwiseKernel("T x, T a", "T y", "y = a * x;", "scaled")(a, np.float64(2), b)
    line = str(cupy._core.ElementwiseKernel.__doc__).splitlines()[0]
    assert line.startswith(
        f"ElementwiseKernel({', '.join(list(inspect.signature(Maker.kernel).parameters)[1:4])}, name="
    )


def test_what_the_emulated_device_says_of_itself(emulated: None) -> None:
    """Under the names that the compiled CuPy uses, which tells nothing of a device without a driver."""
    from cupy_backends.cuda.api import runtime
    from gpubench.emulated import BUS, PROPERTIES

    compiled = Path(runtime.__file__).read_bytes()
    assert all(name.encode() in compiled for name in PROPERTIES)
    assert machine.Clock().bus == BUS


def test_arithmetic_waits_for_the_stream(emulated: None) -> None:
    import cupy

    a = cupy.ones(3, np.float32)
    b = 2 * a + 1
    b /= 3
    c = cupy.sqrt((b - 5) * (b - 5)) > 3
    a[...] = 7
    assert b.get().tolist() == [1, 1, 1]
    assert b.dtype == np.float32
    assert c.get().tolist() == [True] * 3


def test_the_gpu_is_warm_before_it_is_timed(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps come before the clock is read, and the clock is read before and after the rounds."""
    happened: list[str] = []

    class Watched(contenders.Copy):
        def step(self) -> None:
            super().step()
            happened.append("step")

    clock = SimpleNamespace(sm_mhz=lambda: happened.append("clock") or 1980 + len(happened))
    monkeypatch.setattr(measure, "CONTENDERS", measure.CONTENDERS | {"copy": Watched})
    record = start_of(tmp_path, warm_up=1.0)
    case = Case("Adam", 1, 50, ("copy",))
    times = iter(np.arange(0.0, 1000.0, 0.01).tolist())
    with device.one_stream() as stream, mock.patch.object(time, "perf_counter", side_effect=times):
        measure.Measurement(case, record, stream, clock).run(0.0)  # type: ignore[arg-type]
    first, second = (k for k, what in enumerate(happened) if what == "clock")
    assert first > 20  # as many steps in a second, by the clock of this test
    assert second > first + 1
    assert record.rows[0].sm_mhz == [1981 + first, 1981 + second]
