"""One caller at a time in an optimizer: threads wait, calls from within raise, a forked child starts free."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xpoptim as xo
from xpoptim.sync import guard

CALLS: dict[str, Callable[[xo.Optimizer, Any, Any], Any]] = {
    "update": lambda opt, params, grads: opt.update(params, grads),
    "apply": lambda opt, params, grads: opt.apply(params, grads, {"step": 0, "slots": {}}),
    "state_dict": lambda opt, params, grads: opt.state_dict(),
    "load_state_dict": lambda opt, params, grads: opt.load_state_dict(xo.SGD().state_dict()),
}


class Stepping:
    """A schedule that calls the optimizer which asks for it."""

    def __init__(self, call: Callable[[xo.Optimizer, Any, Any], Any]) -> None:
        self.call, self.opt, self.errors = call, xo.SGD(), []

    def __call__(self, step: int) -> float:
        try:
            self.call(self.opt, [np.ones(2)], [np.ones(2)])
        except RuntimeError as error:
            self.errors.append(str(error))
        return 1.0


@pytest.mark.smoke
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("quick", [False, True], ids=["first step", "later step"])
def test_a_call_from_a_schedule_raises(name: str, quick: bool) -> None:
    schedule = Stepping(CALLS[name])
    opt, params, grads = xo.SGD(lr=schedule), [np.zeros(2)], [np.ones(2)]
    for _ in range(2 * quick):
        opt.update(params, grads)
    schedule.opt = opt
    opt.update(params, grads)
    assert schedule.errors
    assert all("while a step of the same optimizer is under way" in error for error in schedule.errors)
    assert all(f"SGD.{name} is called" in error for error in schedule.errors)
    assert opt.state["step"] == 1 + 2 * quick
    assert (params[0] == -(1.0 + 2 * quick)).all()
    schedule.opt = xo.SGD()
    opt.update(params, grads)  # it is free again


def test_an_error_of_a_schedule_leaves_it_free() -> None:
    def schedule(step: int) -> float:
        raise KeyError("no such epoch")

    opt, params, grads = xo.SGD(lr=schedule), [np.zeros(2)], [np.ones(2)]
    with pytest.raises(KeyError):
        opt.update(params, grads)
    opt.lr = 1.0
    opt.update(params, grads)
    assert opt.state["step"] == 1


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.smoke
@pytest.mark.usefixtures("hasty")
def test_threads_wait_for_each_other() -> None:
    """Every step is made and counted, whichever thread makes it, with a schedule that lets others in."""
    opt = xo.SGD(lr=lambda step: float(len(str(step)) > 0))
    params, steps, threads = {"p": np.zeros(1000, np.float32)}, 200, 4
    grads = {"p": np.ones(1000, np.float32)}
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        for _ in range(steps):
            opt.update(params, grads)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert opt.state["step"] == steps * threads
    assert (params["p"] == -steps * threads).all()


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda opt: pickle.loads(pickle.dumps(opt))}


@pytest.mark.smoke
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_waits_for_the_step_of_another_thread(name: str) -> None:
    """A copy has all slots of the same step. A large one takes time, in which another thread would step."""
    opt, params = xo.Momentum(momentum=0.5), {str(i): np.zeros(200_000) for i in range(4)}
    grads = {key: np.ones_like(p) for key, p in params.items()}
    opt.update(params, grads)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            opt.update(params, grads)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(20):
            made = COPIES[name](opt)
            slots = made.state["slots"]["v"].values()
            assert len({bound for v in slots for bound in (v.min(), v.max())}) == 1
    finally:
        stop.set()
        worker.join(30)


def test_a_copy_from_a_schedule_raises() -> None:
    opt = xo.SGD(lr=0.5)

    def schedule(step: int) -> float:
        for name, make in COPIES.items():
            with pytest.raises(RuntimeError, match="while a step of the same optimizer is under way"):
                make(opt)
            seen.append(name)
        return 1.0

    seen: list[str] = []
    opt.lr = schedule
    opt.update([np.zeros(2)], [np.ones(2)])
    assert seen == list(COPIES)


def test_a_copy_has_a_guard_of_its_own() -> None:
    copies = []

    class Copying(xo.SGD):
        pass

    opt = Copying()
    inside, done = threading.Event(), threading.Event()

    def schedule(step: int) -> float:
        inside.set()
        assert done.wait(30)
        return 1.0

    for make in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        copies.append(make(opt) if make in (copy.copy, copy.deepcopy) else make(xo.SGD()))
    opt.lr = schedule
    worker = threading.Thread(target=opt.update, args=([np.zeros(2)], [np.ones(2)]))
    worker.start()
    assert inside.wait(30)
    try:
        for one in copies:
            one.update([np.zeros(2)], [np.ones(2)])
            assert one.state["step"] == 1
    finally:
        done.set()
        worker.join(30)


# A fork while another thread is within a step; what the child does comes behind.
WITHIN_A_STEP = """
import os, threading
import numpy as np, xpoptim as xo

inside, done = threading.Event(), threading.Event()
def schedule(step):
    if step == 1:
        inside.set()
        done.wait(60)
    return 1.0

params, grads = [np.zeros(2)], [np.ones(2)]
opt = xo.SGD(lr=schedule)
opt.update(params, grads)
worker = threading.Thread(target=opt.update, args=(params, grads))
worker.start()
inside.wait(60)
child = os.fork()
"""

FORKED = (
    WITHIN_A_STEP
    + """
if not child:
    opt.lr = 1.0
    opt.update(params, grads)
    threads = [threading.Thread(target=opt.update, args=(params, grads)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    os._exit(opt.state["step"] - 6)
done.set()
worker.join(60)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), opt.state["step"])
"""
)

FORKED_TWICE = f"""
import os, xpoptim

if child := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
{FORKED}"""

FORKED_SAME_NUMBER = (
    WITHIN_A_STEP
    + """
if not child:
    # A thread of the child may have the identifier of the lost one.
    number = worker.ident
    threading.get_ident = lambda: number
    opt.lr = 1.0
    opt.update(params, grads)
    os._exit(opt.state["step"])
done.set()
worker.join(60)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), opt.state["step"])
"""
)

FORKED_WITHIN = """
import os
import numpy as np, xpoptim as xo

child = []
def schedule(step):
    if step == 1 and not child:
        child.append(os.fork())
        try:
            opt.update(params, grads)
        except RuntimeError:
            return 1.0
        os._exit(50)
    return 1.0

params, grads = [np.zeros(2)], [np.ones(2)]
opt = xo.SGD(lr=schedule)
for _ in range(3):
    opt.update(params, grads)
if not child[0]:
    os._exit(opt.state["step"])
print(os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]), opt.state["step"])
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("program", "printed"),
    [(FORKED, "0 2"), (FORKED_TWICE, "0 2"), (FORKED_SAME_NUMBER, "2 2"), (FORKED_WITHIN, "3 3")],
    ids=["beside", "twice", "same number", "within"],
)
def test_a_forked_child_starts_free(program: str, printed: str) -> None:
    """While another thread of the parent is in a step; and within a step, which goes on in both."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


def test_the_lock_of_a_forked_child_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those who read, and so may come within a step."""
    one = guard.Guard()
    lock = one.current()
    assert one.current() is lock
    monkeypatch.setattr(guard, "_forks", guard._forks + 1)
    monkeypatch.setattr(guard, "_forkers", [*guard._forkers, threading.get_ident()])
    assert one.current() is not lock
    assert one.current() is one.lock


def test_forks_are_counted_as_forkers_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard keeps the number, and finds by it the forks that came since."""
    monkeypatch.setattr(guard, "_forks", 0)
    monkeypatch.setattr(guard, "_forkers", [])
    monkeypatch.setattr(guard, "_renewing", guard._renewing)
    for n in range(1, 4):
        guard._after_fork()
        assert guard._forks == len(guard._forkers) == n


HANDLER = """
import signal, time
import numpy as np, xpoptim as xo

refused = stepped = 0
def handler(signum, frame):
    global refused, stepped
    try:
        opt.update(params, grads)
        stepped += 1
    except RuntimeError:
        refused += 1

params, grads = [np.zeros(2)], [np.ones(2)]
opt = xo.SGD(lr=lambda step: 1.0)
opt.update(params, grads)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
steps, end = 1, time.monotonic() + 1.5
while time.monotonic() < end:
    opt.update(params, grads)
    steps += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert opt.state["step"] == steps + stepped, (opt.state["step"], steps, stepped)
assert (params[0] == -opt.state["step"]).all()
print(refused > 10)
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_a_step_from_a_signal_handler_is_refused_within_one_and_made_outside() -> None:
    done = subprocess.run([sys.executable, "-c", HANDLER], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
