"""Forks, and several Python threads that step different optimizers: the results are those of a serial run."""

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_tree, make_optimizer, threads

import xpoptim as xo

JOBS = [("Adam", 1.0), ("SGD", None), ("Momentum", 0.5), ("RMSprop", None), ("Adam", None), ("Nesterov", 2.0)]


def job(name: str, clip_norm: float | None, seed: int, steps: int = 6, size: int = 150_000) -> tuple[Any, Any]:
    """A run whose arrays are large enough to be shared out among threads."""
    rng = np.random.default_rng(seed)
    opt = make_optimizer(name, clip_norm=clip_norm)
    params = {"p": np.ones(size, np.float32), "q": np.ones((31, 7), np.float32)}
    g = rng.standard_normal(size).astype(np.float32)
    for step in range(steps):
        opt.update(params, {"p": np.roll(g, step), "q": np.full((31, 7), step, np.float32)})
    return params, opt.state


@pytest.mark.smoke
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_python_threads(num_threads: int) -> None:
    with threads(1):
        expected = [job(*arguments, seed) for seed, arguments in enumerate(JOBS)]
    results: list[Any] = [None] * len(JOBS)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(JOBS))

    def work(seed: int) -> None:
        try:
            barrier.wait(timeout=60)
            results[seed] = job(*JOBS[seed], seed)
        except BaseException as error:
            errors.append(error)

    with threads(num_threads):
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(len(JOBS))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
    assert not errors
    assert_same_tree(results, expected)


@pytest.mark.smoke
def test_threads_that_compile_the_same_new_rule_at_once() -> None:
    """Tracing and compiling are done once or several times over, but never half."""

    class Fresh(xo.Optimizer):
        lr: float = 0.1
        slots = ("m",)

        @staticmethod
        def rule(xp, p, g, m, *, lr):
            m = 0.25 * m + xp.sqrt(xp.abs(g)) * xp.sign(g)
            return p - lr * m, m

    def run() -> Any:
        opt, params = Fresh(clip_norm=1.0), {"p": np.ones(999, np.float32)}
        for _ in range(3):
            opt.update(params, {"p": np.linspace(-1, 1, 999, dtype=np.float32)})
        return params, opt.state

    results: list[Any] = [None] * 8
    barrier = threading.Barrier(len(results))

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        results[index] = run()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    with xo.engine("reference"):
        expected = run()
    for result in results:
        assert_same_tree(result, expected)


def test_changing_the_number_of_threads_while_another_thread_steps() -> None:
    with threads(1):
        expected = job("Adam", 1.0, 0, steps=30)
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(job("Adam", 1.0, 0, steps=30))
        except BaseException as error:
            errors.append(error)

    with threads(2):
        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            for count in (1, 2, 3, 4):
                xo.set_num_threads(count)
            worker.join(timeout=0.001)
    assert not errors
    assert_same_tree(results, [expected])


def test_an_engine_block_in_one_thread_is_not_seen_by_another() -> None:
    """Otherwise two threads that leave their blocks in another order than they entered would mix them up."""
    entered, seen = threading.Event(), threading.Event()
    failures: list[str] = []

    def other() -> None:
        entered.wait(timeout=60)
        try:
            xo.SGD().update({"p": np.ones(8)[::2]}, {"p": np.ones(4)})  # "fused" would refuse it
        except Exception as error:
            failures.append(str(error))
        seen.set()

    worker = threading.Thread(target=other)
    worker.start()
    with xo.engine("fused"):
        entered.set()
        assert seen.wait(timeout=60)
    worker.join(timeout=60)
    assert failures == []


# A process of its own: one that holds torch or JAX may not fork.
FORK = """
import os, pickle, sys, threading, warnings
sys.path.insert(0, sys.argv[1])
import xpoptim as xo
from test_fork_threads import JOBS, job
from helpers import assert_same_tree, frozen_values

warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, for a fork of a process with threads
xo.set_num_threads(2)
expected = [job(*arguments, seed) for seed, arguments in enumerate(JOBS)]  # the pool is running now


def in_a_child(work):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as out:
                pickle.dump(work(), out)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as inp:
        data = inp.read()
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
    return pickle.loads(data)


# A child works on, also one that forks again and one that sets another number of threads.
assert_same_tree(in_a_child(lambda: job(*JOBS[0], 0)), expected[0])
assert_same_tree(in_a_child(lambda: in_a_child(lambda: job(*JOBS[2], 2))), expected[2])
assert_same_tree(in_a_child(lambda: (xo.set_num_threads(3), job(*JOBS[3], 3))[1]), expected[3])
# The parent, too, afterwards.
assert_same_tree(job(*JOBS[0], 0), expected[0])

# A fork while other threads are in the middle of a step must not leave a lock taken.
stop = threading.Event()


def busy():
    while not stop.is_set():
        job(*JOBS[0], 0, steps=2)


workers = [threading.Thread(target=busy) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(5):
    assert_same_tree(in_a_child(lambda: job(*JOBS[1], 1, steps=6)), expected[1])
stop.set()
for worker in workers:
    worker.join()
print("done")
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork() -> None:
    command = [sys.executable, "-W", "error", "-c", FORK, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr
    assert done.returncode == 0, done.stderr


SPAWN = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from test_fork_threads import JOBS, job
from helpers import assert_same_tree

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.starmap(job, [(*arguments, seed) for seed, arguments in enumerate(JOBS)])
    assert_same_tree(results, [job(*arguments, seed) for seed, arguments in enumerate(JOBS)])
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_pool_of_processes() -> None:
    command = [sys.executable, "-W", "error", "-c", SPAWN, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.smoke
def test_the_interpreter_exits_while_a_pool_is_idle() -> None:
    code = (
        "import numpy as np, xpoptim as xo; xo.set_num_threads(2)\n"
        "p = np.ones(2_000_000, np.float32); xo.SGD().update({'p': p}, {'p': p.copy()}); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("done", "", 0)
