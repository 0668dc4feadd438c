"""CuPy's streams: what an optimizer keeps on a GPU is worked on in turn, and read when it is ready.

Here the GPU is emulated: work runs when it is waited for, so that whoever waits for too little sees old values.
tests/gpu runs the same tests on a GPU, which `GPU.busy` keeps occupied meanwhile.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda_host.emulated import emulated_gpu
from cuda_host.host_kernel import missing
from cuda_host.steps import GPU, Tree, alike, assert_same, moved, trees
from helpers import assert_same_bits, assert_same_tree, make_optimizer, random_values

import xpoptim as xo


@pytest.fixture
def gpu() -> Iterator[GPU]:
    if reason := missing():
        pytest.skip(reason)
    with emulated_gpu() as emulated:
        yield emulated


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=["plain", "norm", "capturable"]
)
COUNTED = pytest.mark.parametrize("options", [{"clip_norm": 0.5}, {"capturable": True}], ids=["norm", "capturable"])


def new_streams(count: int) -> list[Any]:
    import cupy

    return [cupy.cuda.Stream(non_blocking=True) for _ in range(count)]


def small(*, special: float = 0) -> Tree:
    return trees({"float32": np.dtype(np.float32)}, ((7, 9), (4099,), (0,)), special=special)


# --- steps on several streams


def test_two_optimizers_on_two_streams(gpu: GPU) -> None:
    """They do not hold each other up, and both are right."""
    params, streams = small(), new_streams(2)
    opts = [make_optimizer("Adam", clip_norm=0.5) for _ in streams]
    on_gpu = [moved(gpu, params) for _ in streams]
    gradients = [alike(params, seed=step, special=0) for step in range(4)]
    given = [moved(gpu, grads) for grads in gradients]
    for k, stream in enumerate(streams):
        with stream:
            opts[k].update(on_gpu[k], given[0])
    streams[1].synchronize()
    first = gpu.busy(streams[0])
    for grads in given[1:]:
        for k, stream in enumerate(streams):
            with stream:
                opts[k].update(on_gpu[k], grads)
    streams[1].synchronize()
    assert not first.done, "the second stream has waited for the first"
    streams[0].synchronize()
    expected_opt = make_optimizer("Adam", clip_norm=0.5)
    for grads in gradients:
        expected_opt.update(params, grads)
    for k in range(2):
        assert_same(gpu, opts[k], on_gpu[k], expected_opt, params)


@OPTIONS
@pytest.mark.parametrize("count", [4, 800])
def test_one_optimizer_on_several_streams(count: int, options: dict[str, Any], gpu: GPU) -> None:
    """Each step waits on the GPU for the one before, whose stream is busy; the host waits for neither."""
    params = {f"{i}": np.full(3 * (i % 97 == 0), i / 100, np.float32) for i in range(count)}
    streams = new_streams(3)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", **options) for _ in range(2)), moved(gpu, params))
    gradients = [alike(params, seed=step, special=0) for step in range(7)]
    given = [moved(gpu, grads) for grads in gradients]
    events = []
    for step, (grads, on_device) in enumerate(zip(gradients, given, strict=True)):
        stream = streams[step % 3]
        with stream:
            if step > 1:
                events.append(gpu.busy(stream))
                with gpu.quiet():
                    opt.update(on_gpu, on_device)
            else:
                opt.update(on_gpu, on_device)
        expected_opt.update(params, grads)
    assert not any(event.done for event in events), "a step has waited for the GPU"
    stream.synchronize()
    assert all(event.done for event in events)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


@COUNTED
def test_parameters_that_take_turns(options: dict[str, Any], gpu: GPU) -> None:
    """Each on a stream of its own, which nobody else orders: the step count is theirs together."""
    params, streams = {"a": np.full(5, 2.0), "b": np.full(6, 3.0)}, new_streams(2)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", **options) for _ in range(2)), moved(gpu, params))
    kept = []
    for step in range(6):
        key = "ab"[step % 2]
        grads = {name: np.full(p.shape, step + 1.0) if name == key else None for name, p in params.items()}
        on_device = {name: None if g is None else gpu.array(g) for name, g in grads.items()}
        kept.append(on_device)  # for a stream that their memory is not of
        with streams[step % 2]:
            gpu.busy(streams[step % 2])
            opt.update(on_gpu, on_device)
        expected_opt.update(params, grads)
        if step % 3 == 2:
            streams[step % 2].synchronize()
            streams[1 - step % 2].synchronize()
    assert_same(gpu, opt, on_gpu, expected_opt, params)


@pytest.mark.parametrize("kind", ["step", "load"])
def test_memory_of_a_plan_is_not_given_back_too_early(kind: str, gpu: GPU) -> None:
    """A plan made on one stream is used on another; when it goes, the first may use its memory for something else.

    It waits for the steps that used it.
    """
    params, (first, second, third) = {"a": np.full(5, 2.0), "b": np.full(6, 3.0)}, new_streams(3)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", clip_norm=0.5) for _ in range(2)), moved(gpu, params))
    grads = {name: np.full(p.shape, 4.0) for name, p in params.items()}
    given = moved(gpu, grads)
    with first:
        opt.update(on_gpu, given)
    with second:
        opt.update(on_gpu, given)
        state = opt.state_dict()  # which waits
        event = gpu.busy(second)
        opt.update(on_gpu, given)
    with third:
        if kind == "step":
            opt.update(on_gpu, given | {"b": None})  # which takes another plan
        else:
            opt.load_state_dict(state)
    first.synchronize()
    assert event.done
    for _ in range(2):
        expected_opt.update(params, grads)
    expected_state = expected_opt.state_dict()
    expected_opt.update(params, grads)
    if kind == "step":
        expected_opt.update(params, grads | {"b": None})
    else:
        expected_opt.load_state_dict(expected_state)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_memory_of_an_optimizer_is_not_given_back_too_early(gpu: GPU) -> None:
    """Nor its slots, when it goes itself. Streams that it was never used on do not wait."""
    params, (first, second, third) = {"W": gpu.array(np.ones(5))}, new_streams(3)
    opt = make_optimizer("Adam")
    others = [gpu.busy(third) for _ in range(5)]
    for stream in (first, second):
        with stream:
            event = gpu.busy(stream)
            opt.update(params, dict(params))
    del opt
    first.synchronize()
    assert event.done
    assert not others[-1].done


def test_an_optimizer_that_goes_during_a_capture(gpu: GPU) -> None:
    """The capture of a blocking stream would break if the default stream was asked to wait."""
    import cupy

    opt, blocking = make_optimizer("Adam"), cupy.cuda.Stream()
    x, params = gpu.array(np.zeros(3)), {"W": gpu.array(np.ones(5))}
    for stream in (cupy.cuda.Stream.null, blocking, gpu.stream):
        with stream:
            opt.update(params, dict(params))
    with blocking:
        blocking.begin_capture()
        x.fill(1)
        del opt
        graph = blocking.end_capture()
        graph.launch()
    assert gpu.host(x).all()


def test_each_thread_has_a_default_stream(gpu: GPU) -> None:
    """One object in CuPy, but as many streams as threads."""
    import cupy

    params = small()
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", clip_norm=0.5) for _ in range(2)), moved(gpu, params))
    gradients = [alike(params, seed=step, special=0) for step in range(4)]
    given = [moved(gpu, grads) for grads in gradients]
    failures = []

    def steps(few: list[Any], *, wait: bool) -> None:
        try:
            with cupy.cuda.Stream.ptds as stream:
                gpu.busy(stream)
                for grads in few:
                    opt.update(on_gpu, grads)
                if wait:
                    stream.synchronize()
        except BaseException as error:
            failures.append(error)

    for few, wait in ((given[:2], False), (given[2:], True)):
        thread = threading.Thread(target=steps, args=(few,), kwargs={"wait": wait})
        thread.start()
        thread.join()
    assert not failures
    for grads in gradients:
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


# --- what is read


def skipping(gpu: GPU, stream: Any, *, device: int = 0) -> xo.Optimizer:
    """An optimizer whose second of three steps was skipped, or will have been: its stream is busy."""
    import cupy

    opt, params = make_optimizer("Adam", clip_norm=0.5), {"W": gpu.array(np.ones(5), device=device)}
    grads = [{"W": gpu.array(np.full(5, x), device=device)} for x in (1.0, np.nan, 2.0)]
    with cupy.cuda.Device(device), stream:
        for g in grads:
            gpu.busy(stream)
            opt.update(params, g)
    return opt


READS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "state": (lambda opt: opt.state["step"], 2),
    "skipped": (lambda opt: opt.skipped, 1),
    "state_dict": (lambda opt: opt.state_dict()["step"], 2),
    "copy": (lambda opt: copy.copy(opt).state["step"], 2),
    "deepcopy": (lambda opt: copy.deepcopy(opt).state["step"], 2),
    "pickle": (lambda opt: pickle.loads(pickle.dumps(opt)).state["step"], 2),
}


@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize("device", [0, 1])
def test_counts_wait_for_the_step_and_for_nothing_else(device: int, what: str, gpu: GPU) -> None:
    """Wherever they are read: the current stream has other things to do."""
    import cupy

    gpu.array(np.ones(1), device=device)  # skips where there is no such device
    with cupy.cuda.Device(device):
        (stream,) = new_streams(1)
    opt = skipping(gpu, stream, device=device)
    read, expected = READS[what]
    other = gpu.busy(gpu.stream)
    assert read(opt) == expected
    if (what, device) != ("pickle", 0):  # whose slots come to the host on the current stream
        assert not other.done, "reading has waited for the current stream"


def test_check_waits_for_the_step(gpu: GPU) -> None:
    (stream,) = new_streams(1)
    opt = skipping(gpu, stream)
    with pytest.raises(FloatingPointError, match="1 steps were skipped"):
        opt.check()


def test_reading_the_skipped_steps_does_not_change_the_count(gpu: GPU) -> None:
    """The step after it is the third that is applied, not the fourth."""
    params = {"W": np.ones(5)}
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", clip_norm=0.5) for _ in range(2)), moved(gpu, params))
    for x in (1.0, np.nan, 2.0, 3.0):
        opt.update(on_gpu, {"W": gpu.array(np.full(5, x))})
        assert opt.skipped == int(x != 1)
        if np.isfinite(x):
            expected_opt.update(params, {"W": np.full(5, x)})
    assert_same(gpu, opt, on_gpu, expected_opt, params)


@COUNTED
def test_a_count_that_is_written_into_the_state_holds(options: dict[str, Any], gpu: GPU) -> None:
    """Also if it is read before the next step."""
    params, grads = {"W": np.ones(5)}, {"W": np.full(5, 2.0)}
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", **options) for _ in range(2)), moved(gpu, params))
    given = moved(gpu, grads)
    for step in range(4):
        if step == 2:
            opt.state["step"] = expected_opt.state["step"] = 100
            assert opt.state["step"] == 100
            assert opt.skipped == 0
        opt.update(on_gpu, given)
        expected_opt.update(params, grads)
    assert opt.state["step"] == 102
    assert_same(gpu, opt, on_gpu, expected_opt, params)


class Watched:
    """A lock that tells who has it, and when somebody comes for it."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.holder, self.asked = lock, 0, threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        self.lock.acquire()
        self.holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self.holder = 0
        self.lock.release()


@COUNTED
@pytest.mark.parametrize("what", ["state", "skipped"])
def test_a_step_while_another_thread_reads(what: str, options: dict[str, Any], gpu: GPU) -> None:
    """Reading takes time, and must not set back what is counted meanwhile: the step waits."""
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.1

    params, grads = {"W": gpu.array(np.ones(5))}, {"W": gpu.array(np.full(5, 2.0))}
    opt = xo.Adam(lr=schedule, **options)
    opt.update(params, grads)
    worker = threading.Thread(target=opt.update, args=(params, grads))
    (keeper,) = opt._stepper._keepers.values()
    read, opt._guard.lock = keeper.read, Watched(opt._guard.lock)

    def slow(*arguments: Any) -> np.ndarray:
        words, keeper.read = read(*arguments), read
        opt._guard.lock.asked.clear()
        worker.start()
        assert opt._guard.lock.asked.wait(60)
        if opt._guard.lock.holder != threading.get_ident():
            worker.join(60)
        return words

    keeper.read = slow
    getattr(opt, what)
    worker.join(60)
    opt.update(params, grads)
    assert seen == [0, 1, 2]
    assert opt.state["step"] == 3


@COUNTED
def test_a_schedule_may_read_the_counts(options: dict[str, Any], gpu: GPU) -> None:
    """Of the steps before; and so may a signal handler, which is in the same thread."""
    seen: list[tuple[int, int]] = []

    def schedule(step: int) -> float:
        seen.append((opt.state["step"], opt.skipped))
        return 0.1

    params, opt = {"W": gpu.array(np.ones(5))}, xo.Adam(lr=schedule, **options)
    for _ in range(3):
        opt.update(params, {"W": gpu.array(np.full(5, 2.0))})
    assert seen == [(0, 0), (1, 0), (2, 0)]


COPIES: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda opt: opt.state_dict()["slots"],
    "copy": lambda opt: copy.copy(opt).state["slots"],
    "deepcopy": lambda opt: copy.deepcopy(opt).state["slots"],
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)).state["slots"],
}


@OPTIONS
@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_a_state_are_of_one_step(kind: str, options: dict[str, Any], gpu: GPU) -> None:
    """They come after the steps before them, on another stream, and before those after them."""
    params, (first, second) = small(), new_streams(2)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", **options) for _ in range(2)), moved(gpu, params))
    gradients = [alike(params, seed=step, special=0) for step in range(4)]
    given = [moved(gpu, grads) for grads in gradients]
    with first:
        opt.update(on_gpu, given[0])
        gpu.busy(first)
        opt.update(on_gpu, given[1])
    with second:
        gpu.busy(second)
        copied = COPIES[kind](opt)
    with first:
        opt.update(on_gpu, given[2])
        opt.update(on_gpu, given[3])
    first.synchronize()
    for grads in gradients[:2]:
        expected_opt.update(params, grads)
    assert_same_tree(gpu.host(copied), expected_opt.state["slots"])
    for grads in gradients[2:]:
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


# --- what is loaded and handed over


@OPTIONS
@pytest.mark.parametrize("running", [False, True])
def test_a_state_that_is_loaded_on_another_stream(running: bool, options: dict[str, Any], gpu: GPU) -> None:
    """Into an optimizer with steps on their way, and into a new one."""
    params, (first, second) = small(), new_streams(2)
    source, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
    gradients = [alike(params, seed=step, special=0) for step in range(5)]
    expected = {key: p.copy() for key, p in params.items()}
    on_gpu = moved(gpu, params)
    for grads in gradients[:3]:
        source.update(on_gpu, moved(gpu, grads))
        expected_opt.update(expected, grads)
    state = source.state_dict()
    gpu.host(state)  # is ready for every stream
    given = [moved(gpu, grads) for grads in gradients]
    opt, others = make_optimizer("Adam", **options), moved(gpu, params)
    if running:
        with first:
            opt.update(others, given[0])
            gpu.busy(first)
            opt.update(others, given[0])
            gpu.busy(first)
    with second:
        gpu.busy(second)
        opt.load_state_dict(state)
    with first:
        for step in (3, 4):
            opt.update(others if running else on_gpu, given[step])
    first.synchronize()
    for grads in gradients[3:]:
        expected_opt.update(expected, grads)
    assert_same_tree(gpu.host(opt.state), expected_opt.state)


@pytest.mark.parametrize("kind", [copy.copy, copy.deepcopy])
def test_a_copied_optimizer_goes_on_elsewhere(kind: Callable[[Any], Any], gpu: GPU) -> None:
    params, streams = small(), new_streams(3)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", clip_norm=0.5) for _ in range(2)), moved(gpu, params))
    gradients = [alike(params, seed=step, special=0) for step in range(3)]
    given = [moved(gpu, grads) for grads in gradients]
    for step, stream in enumerate(streams):
        with stream:
            gpu.busy(stream)
            if step:
                opt = kind(opt)
        with streams[step - 1]:  # neither that of the step before nor that of the copy
            opt.update(on_gpu, given[step])
        expected_opt.update(params, gradients[step])
    streams[1].synchronize()
    assert_same(gpu, opt, on_gpu, expected_opt, params)


# --- captures


def captured(gpu: GPU, stream: Any, **options: Any) -> tuple[Any, ...]:
    """An optimizer with one step made and one captured, its parameters and gradients, and the same in NumPy."""
    params = {"W": random_values(np.random.default_rng(0), (50,), np.dtype(np.float32))}
    opt, expected_opt = (make_optimizer("Adam", capturable=True, **options) for _ in range(2))
    on_gpu, grads = moved(gpu, params), alike(params, seed=0, special=0)
    buffers = moved(gpu, grads)
    opt.update(on_gpu, buffers)  # on another stream, which is not waited for
    expected_opt.update(params, grads)
    with stream, gpu.capture() as graph:
        opt.update(on_gpu, buffers)
    return graph.made, (opt, on_gpu, buffers), (expected_opt, params, grads)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=["plain", "norm"])
def test_replays_are_seen_when_something_is_read(options: dict[str, Any], gpu: GPU) -> None:
    """They are launched without the optimizer's knowledge, on any stream."""
    stream, elsewhere, reader = new_streams(3)
    graph, (opt, *_), (expected_opt, params, grads) = captured(gpu, stream, **options)
    for launched in (stream, elsewhere, elsewhere):
        with launched:
            opt.prepare_replay()
            gpu.busy(launched)
            graph.launch(launched)
        expected_opt.update(params, grads)
        with reader:
            assert opt.skipped == 0
            assert opt.state["step"] == expected_opt.state["step"]
    with elsewhere:
        opt.prepare_replay()
        gpu.busy(elsewhere)
        graph.launch(elsewhere)
    with reader:
        state = opt.state_dict()
    with elsewhere:
        graph.launch(elsewhere)  # not prepared, and so not ordered behind the copies by that
    elsewhere.synchronize()
    expected_opt.update(params, grads)
    assert_same_tree(gpu.host(state["slots"]), expected_opt.state["slots"])


def test_inputs_of_a_replay_wait_for_the_step_before(gpu: GPU) -> None:
    stream, elsewhere = new_streams(2)
    graph, (opt, on_gpu, buffers), (expected_opt, params, grads) = captured(gpu, stream, clip_norm=0.5)
    for lr in (0.1, 0.01, 0.001):
        opt.lr = expected_opt.lr = lr
        with elsewhere:
            gpu.busy(elsewhere)
            opt.update(on_gpu, buffers)
        opt.lr = expected_opt.lr = lr / 2
        with stream:
            opt.prepare_replay()
            graph.launch()
        stream.synchronize()
        expected_opt.lr = lr
        expected_opt.update(params, grads)
        expected_opt.lr = lr / 2
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_replays_are_seen_when_the_host_counts_again(gpu: GPU) -> None:
    """A graph goes on writing slots, though nothing counts on the GPU."""
    stream, elsewhere = new_streams(2)
    graph, (opt, on_gpu, buffers), (expected_opt, params, grads) = captured(gpu, stream)
    opt.capturable = False
    opt.update(on_gpu, buffers)
    expected_opt.update(params, grads)
    gpu.host(on_gpu)
    gpu.busy(elsewhere)
    graph.launch(elsewhere)
    state = opt.state_dict()
    expected_opt.update(params, grads)
    assert_same_tree(gpu.host(state["slots"]), expected_opt.state["slots"])


WHILE_CAPTURING: dict[str, Callable[[Any], Any]] = {
    **{name: read for name, (read, _) in READS.items()},
    "check": lambda opt: opt.check(),
    "load_state_dict": lambda opt: opt.load_state_dict(opt_state(opt)),
    "prepare_replay": lambda opt: opt.prepare_replay(),
}


def opt_state(opt: Any) -> dict[str, Any]:
    """A state dict that fits, made without reading."""
    slots = {name: {"W": np.zeros(50, np.float32)} for name in ("m", "v")}
    return {"class": "Adam", "step": 7, "slots": slots}


@pytest.mark.parametrize("what", WHILE_CAPTURING)
def test_nothing_is_read_or_loaded_during_a_capture(what: str, gpu: GPU) -> None:
    """The error says when to do it instead; the capture goes on, and nothing has changed."""
    (stream,) = new_streams(1)
    graph, (opt, on_gpu, buffers), (expected_opt, params, grads) = captured(gpu, stream)
    with stream, gpu.capture() as second:
        opt.update(on_gpu, buffers)
        with pytest.raises(RuntimeError, match=r"being captured into a CUDA graph: .* before or after the capture"):
            WHILE_CAPTURING[what](opt)
    for made in (graph, second.made):
        with stream:
            opt.prepare_replay()
            made.launch()
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_a_count_that_was_written_cannot_be_captured(gpu: GPU) -> None:
    """The GPU has to be told of it first, by an ordinary step."""
    (stream,) = new_streams(1)
    _, (opt, on_gpu, buffers), _ = captured(gpu, stream)
    opt.state["step"] = 50
    with stream, gpu.capture() as graph, pytest.raises(RuntimeError, match="cannot be captured"):
        opt.update(on_gpu, buffers)
    assert not graph.names
    opt.update(on_gpu, buffers)
    assert opt.state["step"] == 51


def test_an_event_of_the_step_is_not_part_of_a_graph(gpu: GPU) -> None:
    """What was recorded before a capture is waited for after it as ever."""
    stream, other = new_streams(2)
    graph, (opt, on_gpu, buffers), (expected_opt, params, grads) = captured(gpu, stream)
    with other:
        gpu.busy(other)
        opt.update(on_gpu, buffers)
    expected_opt.update(params, grads)
    other.synchronize()
    with stream:
        opt.prepare_replay()
        graph.launch()
    expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)
    assert_same_bits(gpu.host(opt.state["slots"]["m"]["W"]), expected_opt.state["slots"]["m"]["W"])
