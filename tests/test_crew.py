"""The CPU engine's helpers, and the step that is one call: who is hired, who sleeps, what is held, what is noticed."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_tree, threads

import xpoptim as xo
from xpoptim.engines import crew, scan

LARGE = crew._WORTH_WAKING * 3  # elements for two helpers, woken
SMALL = crew._WORTH_SHARING * 2  # elements for one helper, awake


@pytest.fixture(autouse=True)
def own_crew() -> Iterator[None]:
    """Each test begins without helpers, long after the last job; those that other tests made are put away meanwhile."""
    before = crew._idle, crew._number
    crew._idle, crew._number, crew._ended = [], 0, float("-inf")
    yield
    for helper in crew._idle:
        helper.close()
    crew._idle, crew._number = before


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def arrays(size: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {"p": np.full(size, value, np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# Who is hired


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_a_large_job_hires_helpers_but_for_one_thread(count: int, expected: int) -> None:
    with threads(count):
        helpers, patience = crew.hired(crew.Work(LARGE))
        crew.dismiss(helpers)
    assert (len(helpers), patience) == (expected, 0)
    assert crew._idle == helpers


def test_a_small_job_hires_a_helper_only_soon_after_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    work = crew.Work(SMALL)
    with threads(2):
        assert crew.hired(work) == ([], 0)
        monkeypatch.setattr(crew, "_ended", time.perf_counter() + 1)  # "soon", however slow this machine is
        helpers, patience = crew.hired(work)
        crew.dismiss(helpers)
    assert len(helpers) == 1
    assert patience == work.patience > 0


def test_patience_is_bounded() -> None:
    assert crew.Work(10**12).patience * crew._YIELD <= crew._LONGEST * 1.001
    assert crew.Work(SMALL).patience < crew.Work(LARGE).patience
    assert crew.Work(10**12).most == crew.Work(10**12).most_to_wake == crew.MOST - 1
    assert crew.Work(crew._WORTH_SHARING).most < 1


def test_there_are_never_more_helpers_than_threads_but_one() -> None:
    with threads(3):
        first, _ = crew.hired(crew.Work(LARGE))
        second, _ = crew.hired(crew.Work(LARGE))  # as by another thread meanwhile
        assert (len(first), len(second)) == (2, 0)
        crew.dismiss(second)
        crew.dismiss(first)
    with threads(2):
        helpers, _ = crew.hired(crew.Work(LARGE))
        assert len(helpers) == 1
        crew.dismiss(helpers)


def test_where_no_thread_can_be_started_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    params = arrays(LARGE)
    with threads(2):
        for _ in range(2):
            xo.SGD(lr=0.5).update(params, arrays(LARGE))
    assert (params["p"] == 0).all()
    assert crew._number == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sleeping and waking


def test_an_idle_helper_falls_asleep_and_wakes_for_the_next_job() -> None:
    opt, params = xo.SGD(lr=0.5), arrays(LARGE, 4.0)
    with threads(2):
        for step in range(4):
            opt.update(params, arrays(LARGE))
            (helper,) = crew._idle
            assert wait_for(lambda helper=helper: helper._state.value == crew._ASLEEP), step
    assert (params["p"] == 2).all()


def test_hot_loops_and_pauses_in_any_order_do_every_element_once() -> None:
    rng = np.random.default_rng(0)
    opt, params, steps = xo.SGD(lr=1.0), arrays(SMALL * 4, 0.0), 300
    with threads(2):
        for _ in range(steps):
            opt.update(params, arrays(SMALL * 4))
            if rng.random() < 0.1:
                time.sleep(rng.choice([1e-4, 1e-3, 6e-3]))
    assert (params["p"] == -steps).all()


@pytest.mark.skipif(not crew._cpus(), reason="this system does not let a process choose its CPUs")
def test_a_helper_is_kept_off_its_callers_cpu() -> None:
    helper = crew.Helper()
    crew._idle.append(helper)
    assert wait_for(lambda: helper._state.value == crew._ASLEEP)
    helper._cpus = frozenset(os.sched_getaffinity(0))
    identity = helper._thread.native_id or 0
    helper.keep_off()
    if len(helper._cpus) > 1:
        assert os.sched_getaffinity(identity) == helper._cpus - {helper._kept_off}
    else:
        assert os.sched_getaffinity(identity) == helper._cpus
    helper._cpus, helper._kept_off = frozenset({1 << 14}), -1  # none that there is
    helper.keep_off()
    assert helper._cpus == frozenset()


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
    original = scan.Direct.run

    def run(self: scan.Direct, containers: tuple[Any, ...]) -> bool:
        direct.append(original(self, containers))
        return direct[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan.Direct, "run", run)
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
    "nested": lambda p, g, step: ({"a": p[0], "b": p[1:]}, {"a": g[0], "b": g[1:]}),
    "None now and then": lambda p, g, step: (list(p), [g[0], None if step % 2 else g[1], g[2]]),
}
IN_ONE_CALL = {"dicts", "lists", "keys that are numbers", "None now and then"}


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
    if name in IN_ONE_CALL:
        assert direct == [True] * 3


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
        for _ in range(50):
            opt.update(params, grads)
        after = [sys.getrefcount(x) for x in watched]
    assert [abs(a - b) < 10 for a, b in zip(after, before, strict=True)] == [True] * len(watched)


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
