"""The CPU engine's helpers, and the step that is one call: who is hired, who sleeps, what is held, what is noticed."""

import copy
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_tree, threads

import xpoptim as xo
from xpoptim.engines.cpu import native, thread_pool, watch
from xpoptim.engines.cpu import threads as cpu_threads

needs_extension = pytest.mark.skipif(bool(native.missing()), reason=f"no extension: {native.missing()}")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
LARGE = thread_pool._WORTH_WAKING * 3  # elements for two helpers, woken
SMALL = thread_pool._WORTH_SHARING * 2  # elements for one helper, awake


@pytest.fixture(autouse=True)
def long_after_the_last_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_ended", float("-inf"))


def states() -> list[int]:
    """Of the helpers: 0 asleep, 1 awake, 2 a job lies before it, 3 at work."""
    return extension().states()


def extension() -> Any:
    found = native.extension()
    assert found is not None
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def arrays(size: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {"p": np.full(size, value, np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# Who is hired


def test_threads_are_for_the_cpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems that can tell; else for all that there are."""
    available = cpu_threads.available.__wrapped__
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5} if pid == 0 else set(), raising=False)
    assert available() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available() == 1


@pytest.mark.smoke
@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_a_large_job_hires_helpers_but_for_one_thread(count: int, expected: int) -> None:
    with threads(count):
        assert thread_pool.hired(thread_pool.Work(LARGE)) == (expected, 0)


@needs_extension
def test_helpers_are_made_for_the_first_job_that_hires_them() -> None:
    opt, params = xo.SGD(lr=1.0), arrays(LARGE)
    with threads(3):
        opt.update(params, arrays(LARGE))
    assert len(states()) >= 2


def test_a_small_job_hires_a_helper_only_soon_after_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    work = thread_pool.Work(SMALL)
    monkeypatch.setattr(thread_pool, "available", lambda: 2)
    with threads(2):
        assert thread_pool.hired(work) == (0, 0)
        monkeypatch.setattr(thread_pool, "_ended", time.perf_counter() + 1)  # "soon", however slow this machine is
        assert thread_pool.hired(work) == (1, work.patience)
        assert work.patience > 0
    with threads(3):
        assert thread_pool.hired(work) == (1, 0)  # more threads than CPUs do not wait awake


def test_patience_is_bounded() -> None:
    assert thread_pool.Work(10**12).patience <= thread_pool._LONGEST * 1e9
    assert thread_pool.Work(SMALL).patience < thread_pool.Work(LARGE).patience
    assert thread_pool.Work(10**12).most == thread_pool.Work(10**12).most_to_wake == thread_pool.MOST - 1
    assert thread_pool.Work(thread_pool._WORTH_SHARING).most < 1


JOB = """
define void @job(ptr %job, i64 %worker) {
  %p = getelementptr i64, ptr %job, i64 2
  %old = atomicrmw add ptr %p, i64 1 seq_cst
  br label %wait
wait:
  %now = load atomic i64, ptr %p seq_cst, align 8
  %workers = getelementptr i64, ptr %job, i64 1
  %n = load i64, ptr %workers
  %all = icmp sge i64 %now, %n
  br i1 %all, label %exit, label %wait
exit:
  ret void
}
"""


@pytest.mark.smoke
@needs_extension
def test_a_helper_serves_one_caller_at_a_time() -> None:
    """Two callers of two workers each, with one helper: whoever has it gets two, the other works alone."""
    from xpoptim.engines.cpu.jit import Module

    module = Module(JOB)  # it ends when all of its workers have begun
    address, counted = module.address("job"), []
    with threads(2):
        xo.SGD().update(arrays(LARGE), arrays(LARGE))
        assert states()
        barrier = threading.Barrier(2)

        def call() -> None:
            made = ctypes.c_int64()
            barrier.wait()
            for _ in range(200):
                cursors = thread_pool.cursors()
                job = np.array([cursors.ctypes.data, 0, 0], np.int64)
                call = np.array([0, 0, 0, address, job.ctypes.data], np.int64)
                extension().perform(1, 0, 1, call.ctypes.data, ctypes.addressof(made))
                counted.append((job[1], job[2]))

        callers = [threading.Thread(target=call) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=60)
    assert len(counted) == 400
    assert all(workers == begun and workers in (1, 2) for workers, begun in counted)
    assert {workers for workers, _ in counted} >= {2}


NOTHING = """
import ctypes, os, resource, warnings
import numpy as np
import xpoptim as xo
from xpoptim.engines.cpu import native, thread_pool
from xpoptim.engines.cpu.jit import Module
module = Module("define void @nothing(ptr %job, i64 %worker) { ret void }")
def perform(most):
    # A job with at most so many helpers; how many workers there were.
    cursors, made = thread_pool.cursors(), ctypes.c_int64()
    job = np.array([cursors.ctypes.data, 0], np.int64)
    call = np.array([0, 0, 0, module.address("nothing"), job.ctypes.data], np.int64)
    native.extension().perform(most, 0, 1, call.ctypes.data, ctypes.addressof(made))
    return int(job[1])
"""


@needs_extension
@pytest.mark.parametrize("forked", [False, pytest.param(True, marks=needs_fork)])
def test_there_are_no_more_helpers_than_places(forked: bool) -> None:
    """In a child too, which has none of its parent's."""
    code = f"""{NOTHING}
assert perform(2) == 3 and len(native.extension().states()) == 2
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside threads
    child = os.fork() if {forked} else 0
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert len(native.extension().states()) == (0 if {forked} else 2)
assert perform(1) == 2
assert perform(10 * thread_pool.MOST) == thread_pool.MOST
assert len(native.extension().states()) == thread_pool.MOST - 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_extension
@pytest.mark.smoke
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory so that threads are refused")
def test_where_the_system_refuses_threads_the_caller_works_alone() -> None:
    code = f"""{NOTHING}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limits[1]))  # no stack finds room
assert perform(3) == 1
resource.setrlimit(resource.RLIMIT_AS, limits)
assert perform(3) == 4
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# Without the extension


def run_without_extension(code: str) -> str:
    """What the code prints in a process without the extension, in which every large job is shared with 3 helpers."""
    start = """
import numpy as np, xpoptim as xo
from xpoptim.engines.cpu import native, python_pool
assert native.missing()
xo.set_num_threads(4)
"""
    environment = os.environ | {"XPOPTIM_NATIVE": "0"}
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("RuntimeError", "can't start new thread"),
        ("RuntimeError", "can't create new thread at interpreter shutdown"),  # Python 3.12
        ("PythonFinalizationError", "can't create new thread at interpreter shutdown"),  # from Python 3.13 on
    ],
)
def test_where_python_starts_no_thread_the_caller_works_alone(error: str, text: str) -> None:
    run_without_extension(f"""
import builtins
start = python_pool.start_new_thread
def refuse(*arguments):
    raise getattr(builtins, {error!r}, type({error!r}, (RuntimeError,), {{}}))({text!r})
python_pool.start_new_thread = refuse
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)], [np.ones({4 * LARGE}, np.float32)]
for _ in range(3):
    opt.update(params, grads)
assert (params[0] == -3).all()
python_pool.start_new_thread = start
opt.update(params, grads)
assert (params[0] == -4).all() and python_pool._helpers
""")


@pytest.mark.smoke
@pytest.mark.parametrize("raised", ["Timeout", "RuntimeError"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_what_a_signal_handler_raises_while_a_thread_starts_is_raised_when_the_step_is_made(
    raised: str, place: str
) -> None:
    """Every element once: what a helper has begun is waited for, and the rest is done by the caller."""
    run_without_extension(f"""
class Timeout(RuntimeError):
    pass
start = python_pool.start_new_thread
def interrupted(*arguments):
    if {place == "after"}:
        start(*arguments)
    raise {raised}("a handler's")
python_pool.start_new_thread = interrupted
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)], [np.ones({4 * LARGE}, np.float32)]
try:
    opt.update(params, grads)
except {raised}:
    assert opt.state["step"] == 1 and (params[0] == -1).all()
else:
    raise SystemExit("swallowed")
python_pool.start_new_thread = start
for _ in range(49):
    opt.update(params, grads)
assert (params[0] == -50).all()
""")


@pytest.mark.smoke
def test_ctrl_c_at_any_time_finds_every_element_updated_once() -> None:
    printed = run_without_extension(f"""
import signal, random
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({8 * LARGE}, np.float32)], [np.ones({8 * LARGE}, np.float32)]
opt.update(params, grads)
interrupted = 0
def handler(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-3))
        while True:
            opt.update(params, grads)
    except KeyboardInterrupt:
        interrupted += 1
    assert (params[0] == -opt.state["step"]).all(), (params[0], opt.state["step"])
print(interrupted)
""")
    assert printed == "300\n"


def test_a_finalizer_may_step_while_a_helper_is_made() -> None:
    """In the caller's thread and in a helper's own."""
    printed = run_without_extension(f"""
other, theirs = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)]
ones = [np.ones({4 * LARGE}, np.float32)]

stepping = []
class Stepping:
    def __del__(self):
        if not stepping:  # not again from within
            stepping.append(True)
            other.update(theirs, ones)
            stepping.clear()

start, serve = python_pool.start_new_thread, python_pool._serve
def starting(*arguments):
    Stepping()
    return start(*arguments)
def serving(waiting):
    Stepping()
    serve(waiting)
python_pool.start_new_thread, python_pool._serve = starting, serving
for _ in range(20):
    xo.SGD(lr=1.0).update([np.zeros({8 * LARGE}, np.float32)], [np.ones({8 * LARGE}, np.float32)])
print(other.state["step"] > 1, len(python_pool._helpers) >= 3)
""")
    assert printed == "True True\n"


def test_helpers_are_threads_as_they_were_when_their_queue_was_chosen() -> None:
    """gevent can take the place of Python's threads at any time: greenlets would wait in real queues."""
    run_without_extension(f"""
import _thread
def patched(function, arguments):
    raise SystemExit("a greenlet that waits for ever")
_thread.start_new_thread = patched
opt, params = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)]
opt.update(params, [np.ones({4 * LARGE}, np.float32)])
assert (params[0] == -1).all() and len(python_pool._helpers) == 3
""")


def test_where_no_thread_starts_nobody_is_invited() -> None:
    run_without_extension(f"""
def refuse(*arguments):
    raise RuntimeError("can't start new thread")
python_pool.start_new_thread = refuse
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)], [np.ones({4 * LARGE}, np.float32)]
for _ in range(3):
    opt.update(params, grads)
assert (params[0] == -3).all() and python_pool._waiting.empty()
""")


def test_however_often_a_signal_handler_raises_helpers_are_waited_for() -> None:
    run_without_extension("""
import ctypes, signal, threading, time
caller, begun, ended = threading.get_ident(), [], []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
def run(job, worker):
    if threading.get_ident() == caller:
        while not begun:
            pass
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    else:
        begun.append(1)
        time.sleep(0.1)
        ended.append(1)
def handler(number, frame):
    if threading.current_thread() is threading.main_thread() and not ended:
        raise TimeoutError
signal.signal(signal.SIGALRM, handler)
cursors = np.zeros(512, np.int64)
job = np.array([cursors.ctypes.data, 0], np.int64)
call = [0, 0, 0, ctypes.cast(run, ctypes.c_void_p).value, job.ctypes.data]
try:
    python_pool.perform(1, [call], ctypes.c_int64())
except TimeoutError:
    assert len(ended) == len(begun) == 1
else:
    raise SystemExit("swallowed")
signal.setitimer(signal.ITIMER_REAL, 0)
""")


def test_however_often_a_signal_handler_raises_the_jobs_of_a_step_are_all_done() -> None:
    run_without_extension(f"""
import signal
params = [np.zeros({2 * LARGE}, dtype) for dtype in (np.float32, np.float64, np.complex64, np.complex128)]
opt, grads, raised = xo.SGD(lr=1.0), [np.ones_like(p) for p in params], []
opt.update(params, grads)
def handler(number, frame):
    while frame is not None and frame.f_code is not python_pool.perform.__code__:
        frame = frame.f_back
    if frame is not None:
        raised.append(1)
        raise TimeoutError
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 3e-4, 3e-4)
twice = 0
while twice < 20:
    raised.clear()
    try:
        opt.update(params, grads)
    except TimeoutError:
        twice += len(raised) > 1
    assert all((p == -opt.state["step"]).all() for p in params), (params, opt.state["step"])
signal.setitimer(signal.ITIMER_REAL, 0)
""")


@needs_fork
def test_a_child_has_helpers_of_its_own() -> None:
    printed = run_without_extension(f"""
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside threads
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)], [np.ones({4 * LARGE}, np.float32)]
opt.update(params, grads)
child = os.fork()
opt.update(params, grads)
assert (params[0] == -2).all()
os.write(1, b"%d " % len(python_pool._helpers))
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    os._exit(0)
""")
    assert printed == "3 3 "


def test_what_no_helper_has_begun_is_called_off() -> None:
    run_without_extension(f"""
later = []
python_pool._invite = lambda help_out, helpers: later.extend([help_out] * helpers)  # who are busy with another's
opt, params, grads = xo.SGD(lr=1.0), [np.zeros({4 * LARGE}, np.float32)], [np.ones({4 * LARGE}, np.float32)]
opt.update(params, grads)
assert len(later) == 3 and (params[0] == -1).all()
for help_out in later:  # when the memory may be another's
    help_out()
assert (params[0] == -1).all()
""")


# ---------------------------------------------------------------------------------------------------------------------
# Sleeping and waking


@needs_extension
def test_an_idle_helper_falls_asleep_and_wakes_for_the_next_job() -> None:
    opt, params = xo.SGD(lr=0.5), arrays(LARGE, 4.0)
    with threads(2):
        for step in range(4):
            opt.update(params, arrays(LARGE))
            assert wait_for(lambda: set(states()) == {0}), step
    assert (params["p"] == 2).all()


@pytest.mark.smoke
def test_hot_loops_and_pauses_in_any_order_do_every_element_once() -> None:
    rng = np.random.default_rng(0)
    opt, params, steps = xo.SGD(lr=1.0), arrays(SMALL * 4, 0.0), 300
    with threads(2):
        for _ in range(steps):
            opt.update(params, arrays(SMALL * 4))
            if rng.random() < 0.1:
                time.sleep(rng.choice([1e-4, 1e-3, 6e-3]))
    assert (params["p"] == -steps).all()


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="this system does not let a thread choose its CPUs")
def test_a_helper_wakes_on_another_cpu_than_its_callers() -> None:
    code = f"""{NOTHING}
import time
def threads():
    return set(map(int, os.listdir("/proc/self/task")))
def rest():
    while set(native.extension().states()) != {{0}}:
        time.sleep(1e-3)
allowed, before = os.sched_getaffinity(0), threads()
for mask in (allowed, {{min(allowed)}}, allowed, {{max(allowed)}}, allowed):
    perform(1)
    rest()
    os.sched_setaffinity(0, mask)
    perform(1)
    helper, = threads() - before
    cpus = os.sched_getaffinity(helper)
    assert cpus <= mask and len(cpus) == max(1, len(mask) - 1), (cpus, mask)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.smoke
def test_the_interpreter_exits_while_a_helper_is_awake() -> None:
    code = f"""
import numpy as np, xpoptim as xo
xo.set_num_threads(2)
opt, params, grads = xo.Adam(), {{"p": np.ones({SMALL})}}, {{"p": np.ones({SMALL})}}
for _ in range(200):
    opt.update(params, grads)
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# The step in one call


def stepped(make: Callable[[int], tuple[Any, Any]], steps: int = 4) -> tuple[Any, Any, list[bool]]:
    """Parameters and state after steps over ``make``'s containers (the same arrays), and which were one call."""
    opt, direct, params = xo.Momentum(lr=0.5), [], None
    original = watch.Direct.run

    def run(self: watch.Direct, inputs: Any, containers: tuple[Any, ...], made: Any) -> bool:
        direct.append(original(self, inputs, containers, made))
        assert made.value == direct[-1]
        return direct[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Direct, "run", run)
        for step in range(steps):
            params, grads = make(step)
            opt.update(params, grads)
    return params, opt.state, direct


P = [np.ones(3), np.ones((2, 2)), np.ones(5)]
G = [np.full(3, 1.0), np.full((2, 2), 2.0), np.full(5, 3.0)]
KEYS = ["a", "b", "c"]

CONTAINERS: dict[str, Callable[[list[Any], list[Any], int], tuple[Any, Any]]] = {
    "dicts": lambda p, g, step: (dict(zip(KEYS, p, strict=True)), dict(zip(KEYS, g, strict=True))),
    "lists": lambda p, g, step: (list(p), list(g)),
    "keys that are numbers": lambda p, g, step: (dict(enumerate(p)), dict(enumerate(g))),
    "other key objects": lambda p, g, step: (
        {f"{k}{'x' * 3}": x for k, x in zip(KEYS, p, strict=True)},
        {f"{k}{'x' * 3}": x for k, x in zip(KEYS, g, strict=True)},
    ),
    "gradients in another order": lambda p, g, step: (
        dict(zip(KEYS, p, strict=True)),
        dict(zip(KEYS[::-1], g[::-1], strict=True)),
    ),
    "a gradient too many": lambda p, g, step: (
        dict(zip(KEYS, p, strict=True)),
        {**dict(zip(KEYS, g, strict=True)), "d": 0},
    ),
    "tuples": lambda p, g, step: (tuple(p), tuple(g)),
    "gradients in a tuple": lambda p, g, step: (list(p), tuple(g)),
    "an array alone": lambda p, g, step: (p[1], g[1]),
    "nested": lambda p, g, step: ({"a": p[0], "b": p[1:]}, {"a": g[0], "b": g[1:]}),
    "None now and then": lambda p, g, step: (list(p), [g[0], None if step % 2 else g[1], g[2]]),
}
IN_ONE_CALL = {"an array alone", "dicts", "lists", "keys that are numbers", "None now and then"}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_any_kind(name: str) -> None:
    def run() -> tuple[Any, Any, list[bool]]:
        p = [x.copy() for x in P]
        return stepped(lambda step: CONTAINERS[name](p, [x.copy() for x in G], step))

    params, state, direct = run()
    with xo.engine("reference"):
        expected, expected_state, never = run()
    assert_same_tree(params, expected)
    assert_same_tree(state, expected_state)
    assert all(direct) is (name in IN_ONE_CALL) or not direct
    assert not never
    if name in IN_ONE_CALL and not native.missing():
        assert direct == [True] * 3


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("params", "grads"),
    [
        (lambda p: p, lambda g: list(g.values())),
        (lambda p: list(p.values()), lambda g: list(g.values())),
        (lambda p: p, lambda g: dict(enumerate(g.values()))),
        (lambda p: p, lambda g: dict(list(g.items())[:2])),
        (lambda p: dict(list(p.items())[:2]), lambda g: g),
        (lambda p: p, lambda g: g | {"a": np.ones(4)}),
        (lambda p: p, lambda g: g | {"a": 1}),
        (lambda p: p, lambda g: g | {"a": [1.0]}),
        (lambda p: p | {"a": np.ones(4)}, lambda g: g | {"a": np.ones(4)}),
    ],
)
def test_what_no_longer_fits_is_refused_as_at_first(params: Any, grads: Any) -> None:
    opt = xo.Momentum()
    p, g = dict(zip(KEYS, [x.copy() for x in P], strict=True)), dict(zip(KEYS, G, strict=True))
    for _ in range(3):
        opt.update(p, g)
    before = {key: x.copy() for key, x in p.items()}
    with pytest.raises((TypeError, ValueError)):
        opt.update(params(p), grads(g))
    assert_same_tree(p, before)
    assert opt.state["step"] == 3


@pytest.mark.smoke
@pytest.mark.parametrize("size", [7, LARGE], ids=["holding the lock", "letting go of it"])
def test_references_are_given_back(size: int) -> None:
    opt = xo.Adam()
    params = {"p": np.ones(size, np.float32), "q": np.ones(2, np.float32)}
    grads: dict[str, Any] = {"p": np.ones(size, np.float32), "q": None}
    with threads(2):
        for _ in range(2):
            opt.update(params, grads)
        watched = [*params.values(), grads["p"], None, opt.state["slots"]["m"]["p"], params, grads]
        before = [sys.getrefcount(x) for x in watched]
        for _ in range(300):
            opt.update(params, grads)

    def given_back() -> bool:  # in the end: without the extension a helper may still hold a job that was called off
        after = [sys.getrefcount(x) for x in watched]
        return all(abs(a - b) < 100 for a, b in zip(after, before, strict=True))  # some let go of a None meanwhile

    assert wait_for(given_back)


def test_arrays_are_held_while_other_threads_run() -> None:
    """Another thread empties the containers and frees what it can in the middle of a long step."""
    size, stop = LARGE * 4, threading.Event()
    params: dict[str, Any] = {}
    grads: dict[str, Any] = {}

    def clear() -> None:
        while not stop.is_set():
            if grads:
                grads.clear()
                gc.collect()

    kept = np.zeros(size, np.float32)
    expected = 0.0
    with threads(2):
        opt = xo.SGD(lr=1.0)
        opt.update({"p": kept}, {"p": np.zeros(size, np.float32)})
        worker = threading.Thread(target=clear)
        worker.start()
        try:
            for _ in range(40):
                params["p"], grads["p"] = kept, np.ones(size, np.float32)
                try:
                    opt.update(params, grads)
                except (ValueError, RuntimeError):  # it was cleared before the step
                    continue
                expected -= 1
        finally:
            stop.set()
            worker.join()
    assert (kept == expected).all()


def test_slots_under_other_keys() -> None:
    """Where an array lies does not tell whose slot it is."""
    opt, params = xo.Momentum(lr=1.0), {"a": np.zeros(2), "b": np.zeros(2)}
    grads = {"a": np.ones(2), "b": np.full(2, 10.0)}
    for _ in range(3):
        opt.update(params, grads)
    with xo.engine("reference"):
        expected = copy.deepcopy(opt)
        other = {key: x.copy() for key, x in params.items()}
    for one in (opt, expected):
        v = one.state["slots"]["v"]
        one.state["slots"]["v"] = {"b": v["a"], "a": v["b"]}
    opt.update(params, grads)
    with xo.engine("reference"):
        expected.update(other, grads)
    assert_same_tree(params, other)
    v = opt.state["slots"]["v"]
    v["zzz"] = v.pop("b")
    with pytest.raises(ValueError, match="zzz"):
        opt.update(params, grads)


@pytest.mark.parametrize("slots", [None, [], {"v": None}, {"v": []}])
def test_a_state_without_slots(slots: Any) -> None:
    opt, params = xo.Momentum(), {"a": np.zeros(2)}
    for _ in range(3):
        opt.update(params, {"a": np.ones(2)})
    opt.state["slots"] = slots
    with pytest.raises(ValueError, match="slots"):
        opt.update(params, {"a": np.ones(2)})


@pytest.mark.parametrize("size", [5_000, 200_000, 600_000])
def test_one_optimizer_in_several_threads_does_not_break_the_interpreter(size: int) -> None:
    """It makes no sense, and says nothing of the values; but memory must stay whole."""
    code = f"""
import threading
import numpy as np, xpoptim as xo
xo.set_num_threads(3)
opt, params = xo.SGD(lr=0.0), {{"p": np.ones({size}, np.float32)}}
def work():
    for _ in range(300):
        opt.update(params, {{"p": np.ones({size}, np.float32)}})
all_threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in all_threads]
[t.join() for t in all_threads]
print((params["p"] == 1).all())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_long_steps_in_a_thread_with_a_small_stack() -> None:
    code = """
import threading
import numpy as np, xpoptim as xo
def work():
    opt = xo.Adam()
    params, grads = [{str(i): np.ones(100) for i in range(4000)} for _ in range(2)]
    for _ in range(4):
        opt.update(params, grads)
    print(opt.state["step"])
xo.Adam().update([np.ones(3)], [np.ones(3)])
threading.stack_size(1 << 17)
worker = threading.Thread(target=work)
worker.start()
worker.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_an_array_alone_is_looked_at_like_one_in_a_container() -> None:
    p = np.zeros(4)
    opt = xo.Momentum(lr=1.0)
    for g in (np.ones(4), np.ones(4), p):  # the last acts as if copied first
        opt.update(p, g)
    expected = {"p": np.zeros(4)}
    other = xo.Momentum(lr=1.0)
    for step in range(3):
        other.update(expected, {"p": expected["p"].copy() if step == 2 else np.ones(4)})
    assert p.tolist() == expected["p"].tolist()
    for bad in (np.ones(3), np.ones((4, 1)), [np.ones(4)], {"p": np.ones(4)}, 1.0):
        with pytest.raises((TypeError, ValueError)):
            opt.update(p, bad)
    p.resize(6, refcheck=False)
    with pytest.raises(ValueError, match="shape"):
        opt.update(p, np.ones(6))
    assert opt.state["step"] == 3
