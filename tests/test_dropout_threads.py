"""Dropout in several threads, in signal handlers and across forks: every training forward has a number of its own."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest

import xpoptim as xo
from xpoptim import random
from xpoptim._dropout.layer import _Forward
from xpoptim.engines import blocks
from xpoptim.sync.atomic import Atomic

LARGE = 400_000  # so that kernels take a while, and run without the interpreter's lock
WAIT = 60  # seconds until a test fails that would hang


@pytest.fixture(autouse=True)
def _no_global_seed() -> Iterator[None]:
    yield
    random.seed(None)


@contextmanager
def eager_switches() -> Iterator[None]:
    """The interpreter lets another thread in as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(0)`` to ``work(n - 1)``, each in a thread of its own, begun together."""
    results: list[Any] = [None] * n
    errors: list[BaseException] = []
    start = threading.Barrier(n)

    def run(index: int) -> None:
        try:
            start.wait(timeout=WAIT)
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=2 * WAIT)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


def in_a_thread(work: Callable[[], Any]) -> Any:
    return in_threads(1, lambda _: work())[0]


def masked(x: np.ndarray, drop: xo.Dropout, call: int) -> np.ndarray:
    return xo.dropout(x, drop.dropout_ratio, seed=drop.seed, stream=drop.layer << 32 | call, inverted=drop.inverted)


@pytest.mark.smoke
class TestNumbers:
    @pytest.mark.parametrize("size", [3, LARGE])
    @pytest.mark.parametrize("engine", ["fused", "reference"])
    def test_no_two_forwards_share_a_mask(self, engine: str, size: int) -> None:
        drop, x = xo.Dropout(0.5, seed=1, layer=3), np.arange(1.0, 1.0 + size, dtype=np.float32)

        def work(_: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
            made = []
            with xo.engine(engine):
                for _ in range(6 if size == LARGE else 60):
                    y = drop.forward(x)
                    made.append((drop.call, y, drop.backward(x)))
                    assert drop.mask.shape == x.shape
            return made

        with eager_switches():
            made = [one for several in in_threads(4, work) for one in several]
        assert sorted(call for call, _, _ in made) == list(range(1, len(made) + 1))
        for call, y, dx in made:
            expected = masked(x, drop, call)
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(dx, expected)
        assert drop.call == len(made)  # the latest of all, for this thread has made none
        assert drop.state_dict()["call"] == len(made)

    def test_no_change_of_a_value_is_lost(self) -> None:
        count = Atomic(0)
        with eager_switches():
            made = in_threads(4, lambda _: [count.change(lambda n: n + 1) for _ in range(3000)])
        assert sorted(n for several in made for n in several) == list(range(1, 12_001))
        assert all(several == sorted(several) for several in made)
        assert count.get() == 12_000

    def test_threads_that_assign_while_others_run_forwards(self) -> None:
        """Each forward has one set of settings, which its backward knows; and no assignment is lost."""
        drop, x, stop = xo.Dropout(0.25, seed=1), np.ones(64), threading.Event()

        def work(index: int) -> int:
            if index == 0:
                for k in range(400):
                    drop.dropout_ratio = (0.25, 0.75)[k % 2]
                    assert drop.dropout_ratio == (0.25, 0.75)[k % 2]
                stop.set()
                return 0
            if index == 1:
                while not stop.is_set():
                    for inverted in (True, False):
                        drop.inverted = inverted
                        assert drop.inverted is inverted
                return 0
            made = 0
            while made < 100 or not stop.is_set():
                y, made = drop.forward(x), made + 1
                np.testing.assert_array_equal(drop.backward(x), y)
                np.testing.assert_array_equal(drop.mask, y != 0)
                both = [(ratio, inverted) for ratio in (0.25, 0.75) for inverted in (False, True)]
                stream = drop.call
                candidates = [xo.dropout(x, r, seed=1, stream=stream, inverted=i).tobytes() for r, i in both]
                assert y.tobytes() in candidates
            return made

        with eager_switches():
            made = in_threads(4, work)
        assert drop.call == sum(made)
        assert drop.dropout_ratio == 0.75

    def test_a_refused_forward_uses_up_no_number(self) -> None:
        drop = xo.Dropout(0.5, seed=1, broadcast_axes=(1,))
        x = np.ones((3, 4))
        drop.forward(x)
        before = drop.state_dict()
        foreign = x.astype(x.dtype.newbyteorder("S"))
        bad_outs = np.ones(3), np.ones((3, 4), "f4")
        for arguments in ((x[0],), (x.astype(int),), ("x",), (x, 1), *((x, True, out) for out in bad_outs)):
            with pytest.raises((TypeError, ValueError)):
                drop.forward(*arguments)
        with xo.engine("fused"), pytest.raises(ValueError, match="x cannot take the fused path"):
            drop.forward(foreign)
        drop.broadcast_axes = ()
        with xo.engine("fused"), pytest.raises(ValueError, match="x cannot take the fused path"):
            drop.forward(foreign)
        drop.broadcast_axes = (1,)
        assert drop.state_dict() == before
        np.testing.assert_array_equal(drop.backward(x) != 0, drop.mask)

    def test_layers_of_a_global_seed_have_numbers_of_their_own(self) -> None:
        random.seed(4)
        with eager_switches():
            made = in_threads(6, lambda _: [xo.Dropout() for _ in range(200)])
        layers = sorted(drop.layer for several in made for drop in several)
        assert layers == list(range(1200))
        assert {drop.seed for several in made for drop in several} == {4}

    def test_a_seed_that_is_set_while_layers_are_made(self) -> None:
        """A layer has seed and number of one setting; numbers under one setting are unique."""

        def work(index: int) -> list[tuple[int, int]]:
            if index == 0:
                for s in range(1, 200):
                    random.seed(s)
                return []
            return [(drop.seed, drop.layer) for drop in (xo.Dropout() for _ in range(400))]

        random.seed(0)
        with eager_switches():
            made = [one for several in in_threads(4, work) for one in several]
        assert len(set(made)) == len(made)
        for s in {s for s, _ in made}:
            numbers = sorted(layer for seed, layer in made if seed == s)
            assert numbers == list(range(len(numbers)))

    def test_the_operating_system_is_not_asked_for_a_seed_under_a_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Others go on while it takes its time; a fork, too, must not find a lock taken."""
        urandom, others = os.urandom, []

        def slow(n: int) -> bytes:
            if not others:
                others.append(None)  # not again from the thread below
                thread = threading.Thread(target=lambda: others.append(xo.Dropout()), daemon=True)
                thread.start()
                thread.join(timeout=5)
            return urandom(n)

        monkeypatch.setattr(os, "urandom", slow)
        drop = xo.Dropout()
        assert len(others) == 2
        assert others[1].seed != drop.seed


class Paused:
    """Kernels of arrays of a given size wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        run = blocks.Kernel.run

        def paused(kernel: blocks.Kernel, x: Any, *rest: Any) -> None:
            if x.size == size and not self.entered.is_set():
                self.entered.set()
                assert self.go.wait(timeout=WAIT)
            run(kernel, x, *rest)

        monkeypatch.setattr(blocks.Kernel, "run", paused)


class TestOutOfOrder:
    """Forward 2 begins before forward 3, of another shape and other settings, and ends after it."""

    def run(self, monkeypatch: pytest.MonkeyPatch) -> tuple[xo.Dropout, dict[str, Any]]:
        drop, seen = xo.Dropout(0.25, seed=1), {}
        drop.forward(np.ones(7))
        paused = Paused(monkeypatch, 77)

        def first() -> None:
            x = np.ones(77)
            y = drop.forward(x)
            seen["first"] = (drop.call, y, drop.backward(x), drop.mask)

        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        assert paused.entered.wait(timeout=WAIT)
        drop.dropout_ratio, drop.inverted = 0.75, True

        def second() -> None:
            x = np.ones((5, 6), np.float32)
            y = drop.forward(x)
            seen["second"] = (drop.call, y, drop.backward(x), drop.mask)

        in_a_thread(second)
        seen["between"] = drop.call, drop.state_dict()
        paused.go.set()
        thread.join(timeout=WAIT)
        return drop, seen

    def test_each_thread_has_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drop, seen = self.run(monkeypatch)
        call, y, dx, mask = seen["first"]
        assert call == 2
        np.testing.assert_array_equal(y, xo.dropout(np.ones(77), 0.25, seed=1, stream=2))
        np.testing.assert_array_equal(dx, y)
        np.testing.assert_array_equal(mask, y != 0)
        call, y, dx, mask = seen["second"]
        assert call == 3
        np.testing.assert_array_equal(y, xo.dropout(np.ones((5, 6), "f4"), 0.75, seed=1, stream=3, inverted=True))
        np.testing.assert_array_equal(dx, y)
        np.testing.assert_array_equal(mask, y != 0)
        # This thread's is the first of all, with the settings and the shape of then.
        assert drop.call == 1
        np.testing.assert_array_equal(drop.backward(np.ones(7)), xo.dropout(np.ones(7), 0.25, seed=1, stream=1))
        with pytest.raises(ValueError, match=r"dout has shape \(8,\) but x had shape \(7,\) in the forward of call 1"):
            drop.backward(np.ones(8))

    def test_a_thread_without_forwards_has_the_latest_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drop, seen = self.run(monkeypatch)

        def other() -> tuple[int, np.ndarray, np.ndarray]:
            with pytest.raises(ValueError, match=r"x had shape \(5, 6\) in the forward of call 3"):
                drop.backward(np.ones(77))
            return drop.call, drop.backward(np.ones((5, 6), np.float32)), drop.mask

        call, dx, mask = in_a_thread(other)
        assert call == 3
        np.testing.assert_array_equal(dx, seen["second"][1])
        np.testing.assert_array_equal(mask, seen["second"][3])

    def test_what_is_known_of_earlier_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It follows the numbers, whichever forward ends first."""
        drop, seen = self.run(monkeypatch)
        latest = drop.state_dict()
        assert seen["between"] == (1, latest)
        assert latest["call"] == 3
        assert latest["latest"]["shape"] == [5, 6]
        assert (latest["latest"]["shape_since"], latest["latest"]["settings_since"]) == (3, 3)
        np.testing.assert_array_equal(drop.backward(np.ones((5, 6), "f4"), call=3), seen["second"][1])
        with pytest.raises(ValueError, match="were changed between call 2 and call 3"):
            drop.backward(np.ones(77), call=2)
        # Its own latest a thread knows, whatever the others did since.
        np.testing.assert_array_equal(drop.backward(np.ones(7), call=1), drop.backward(np.ones(7)))
        with pytest.raises(ValueError, match=r"^call must be from 1 to 3 .*, not 4"):
            drop.backward(np.ones(7), call=4)

    def test_an_earlier_call_of_the_same_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two layers' worth of threads on one shape: any of their calls is known exactly."""
        drop, x = xo.Dropout(0.5, seed=1), np.ones(9)
        paused = Paused(monkeypatch, 9)
        thread = threading.Thread(target=drop.forward, args=(x,), daemon=True)
        thread.start()
        assert paused.entered.wait(timeout=WAIT)
        in_a_thread(lambda: drop.forward(x))
        paused.go.set()
        thread.join(timeout=WAIT)
        for call in (1, 2):
            np.testing.assert_array_equal(drop.backward(x, call=call), masked(x, drop, call))
            with pytest.raises(ValueError, match=rf"but x had shape \(9,\) in the forward of call {call}"):
                drop.backward(np.ones(8), call=call)


class TestCopies:
    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda drop: pickle.loads(pickle.dumps(drop))])
    def test_a_copy_has_the_latest_of_all(self, again: Callable[[Any], Any]) -> None:
        drop = xo.Dropout(0.5, seed=1)
        drop.forward(np.ones(5))
        y = in_a_thread(lambda: drop.forward(np.ones((6, 7))))
        assert drop.call == 1
        other = again(drop)
        assert other.call == 2
        np.testing.assert_array_equal(other.backward(np.ones((6, 7))), y)
        np.testing.assert_array_equal(other.mask, y != 0)
        assert other.state_dict() == drop.state_dict()
        # They go on apart, this thread's latest included.
        np.testing.assert_array_equal(other.forward(np.ones(5)), masked(np.ones(5), drop, 3))
        assert (drop.call, other.call) == (1, 3)
        np.testing.assert_array_equal(drop.forward(np.ones(5)), masked(np.ones(5), drop, 3))

    def test_a_loaded_state_holds_in_every_thread(self) -> None:
        """Also in one that was in a forward meanwhile: what it had made was another run's."""
        saved = xo.Dropout(0.75, seed=8, layer=2)
        for _ in range(5):
            y = saved.forward(np.ones(11))
        drop = xo.Dropout(0.5, seed=1)
        loaded, made = threading.Event(), threading.Event()

        def other() -> tuple[int, np.ndarray, np.ndarray, int]:
            drop.forward(np.ones(3))
            made.set()
            assert loaded.wait(timeout=WAIT)
            return drop.call, drop.backward(np.ones(11)), drop.forward(np.ones(4)), drop.call

        def work(index: int) -> Any:
            if index:
                return other()
            assert made.wait(timeout=WAIT)
            drop.forward(np.ones(6))
            drop.load_state_dict(saved.state_dict())
            loaded.set()
            return drop.call

        call, (before, dx, next_y, after) = in_threads(2, work)
        assert (call, before, after) == (5, 5, 6)
        np.testing.assert_array_equal(dx, y)
        np.testing.assert_array_equal(next_y, saved.forward(np.ones(4)))
        assert drop.call == 6  # of all, for since the state was loaded this thread has made none

    def test_a_state_that_is_loaded_in_the_middle_of_a_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The forward ends with the seed it began with, and is forgotten."""
        drop, paused = xo.Dropout(0.5, seed=1), Paused(monkeypatch, 77)
        results = []

        def other() -> None:
            y = drop.forward(np.ones(77))
            results.append((y, drop.call))

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        assert paused.entered.wait(timeout=WAIT)
        state = xo.Dropout(0.25, seed=9, layer=4).state_dict()
        drop.load_state_dict(state)
        paused.go.set()
        thread.join(timeout=WAIT)
        ((y, call),) = results
        np.testing.assert_array_equal(y, xo.dropout(np.ones(77), 0.5, seed=1, stream=1))
        assert call == 0
        assert drop.state_dict() == state


class TestMemory:
    def test_threads_that_end_leave_nothing(self) -> None:
        drop = xo.Dropout(0.5, seed=1)
        for _ in range(3):
            in_threads(8, lambda _: drop.forward(np.ones(9173)))  # a shape of this test alone
        gc.collect()
        kept = [one for one in gc.get_objects() if type(one) is _Forward and one.shape == (9173,)]
        assert len(kept) <= 1  # the latest of all

    def test_layers_that_go_leave_nothing_in_a_thread(self) -> None:
        drop = xo.Dropout(0.5, seed=1)
        drop.forward(np.ones((2, 3, 1733)))
        there = weakref.ref(drop)
        del drop
        gc.collect()
        assert there() is None
        assert not [one for one in gc.get_objects() if type(one) is _Forward and one.shape == (2, 3, 1733)]

    def test_the_activation_of_another_thread_is_not_kept(self) -> None:
        drop, kept = xo.Dropout(0.5, seed=1), []
        release, made = threading.Event(), threading.Event()

        def work() -> None:
            x = np.ones(1000)
            y = drop.forward(x)
            kept.extend([weakref.ref(x), weakref.ref(y)])
            del x, y
            made.set()
            assert release.wait(timeout=WAIT)  # the thread, with its latest forward, is still there

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert made.wait(timeout=WAIT)
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        release.set()
        thread.join(timeout=WAIT)

    def test_the_history_does_not_grow(self) -> None:
        drop, x = xo.Dropout(0.5, seed=1), np.ones(3)
        before = 0
        for round_ in range(3):
            for _ in range(500):
                drop.forward(x)
            gc.collect()
            count = len(gc.get_objects())
            assert round_ == 0 or count <= before + 50
            before = count


# --- In the middle of a call ------------------------------------------------------------------------------

FILES = ("_dropout/layer.py", "_dropout/arrays.py", "random.py", "atomic.py", "hints.py", "blocks.py")


class Interrupted(BaseException):
    pass


def at_each_bytecode(
    call: Callable[[], Any], handler: Callable[[], Any], after: Callable[[], Any] = lambda: None
) -> int:
    """Repeats a call and runs a handler, as a signal's, before one bytecode of the package: a later one each time.

    Returns how many there were. If the handler raises `Interrupted`, so does the call. ``after`` looks at what is left.
    """
    before, place = sys.gettrace(), 0
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for it when tracing begins
    while True:
        left = place

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.endswith(FILES):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == -1:
                    handler()  # not traced: the tracer is off while it runs
            return trace

        sys.settrace(trace)
        try:
            call()
        except Interrupted:
            pass
        finally:
            sys.settrace(before)
        after()
        if left >= 0:
            return place
        place += 1


class TestInTheMiddle:
    x = np.arange(1.0, 257.0)

    def test_a_forward_within_a_forward_draws_its_own_number(self) -> None:
        drop, outputs, results = xo.Dropout(0.5, seed=1), [], []
        drop.forward(self.x)

        def outer() -> None:
            outputs.append(drop.forward(self.x))

        def handler() -> None:
            y = drop.forward(self.x)
            outputs.append(y)
            results.append(np.array_equal(drop.backward(self.x), y))

        places = at_each_bytecode(outer, handler)
        assert places > 100
        assert all(results)
        expected = {masked(self.x, drop, call).tobytes() for call in range(2, 2 + len(outputs))}
        assert {y.tobytes() for y in outputs} == expected
        assert len(outputs) == len(expected) == 2 * places + 1
        assert drop.state_dict()["call"] == 1 + len(outputs)

    def test_the_outer_forward_is_the_latest_of_its_thread_once_it_returns(self, monkeypatch: Any) -> None:
        drop, run, inner = xo.Dropout(0.5, seed=1), blocks.Kernel.run, []

        def interrupted(kernel: blocks.Kernel, *arguments: Any) -> None:
            if not inner:
                inner.append(0)
                inner[0] = drop.forward(np.ones(30))
                assert drop.call == 2
                np.testing.assert_array_equal(drop.backward(np.ones(30)), inner[0])
            run(kernel, *arguments)

        monkeypatch.setattr(blocks.Kernel, "run", interrupted)
        y = drop.forward(self.x)
        assert drop.call == 1
        np.testing.assert_array_equal(drop.backward(self.x), y)
        np.testing.assert_array_equal(y, masked(self.x, drop, 1))
        np.testing.assert_array_equal(drop.backward(np.ones(30), call=2), inner[0])
        assert drop.state_dict()["call"] == copy.copy(drop).call == 2

    def test_a_handler_that_raises_leaves_a_whole_state(self) -> None:
        """The forward it stopped has used up its number or has not; the backward is that of the one before."""
        drop, x = xo.Dropout(0.5, seed=1), self.x
        y = drop.forward(x)
        call = count = 1
        used = []

        def raising() -> None:
            raise Interrupted

        def outer() -> None:
            nonlocal y
            y = drop.forward(x)

        def after() -> None:
            nonlocal y, call, count
            state = drop.state_dict()
            used.append(state["call"] - count)
            assert state["latest"]["shape_since"] == state["latest"]["settings_since"] == 1
            assert drop.call in (call, count + 1)
            if drop.call == call:
                np.testing.assert_array_equal(drop.backward(x), y)
            np.testing.assert_array_equal(drop.backward(x), masked(x, drop, drop.call))
            y = drop.forward(x)
            call = count = drop.call
            assert call == state["call"] + 1
            np.testing.assert_array_equal(y, masked(x, drop, call))
            np.testing.assert_array_equal(drop.backward(x), y)

        assert at_each_bytecode(outer, raising, after) > 100
        assert set(used) == {0, 1}
        assert used == sorted(used)  # the checks come first

    def test_a_forward_that_fails_is_not_the_latest_of_its_thread(self, monkeypatch: Any) -> None:
        """The array before it is the one whose gradient may come yet."""
        drop = xo.Dropout(0.5, seed=1)
        y = drop.forward(self.x)

        def failing(*_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(blocks.Kernel, "run", failing)
            with pytest.raises(MemoryError):
                drop.forward(np.ones(30))
        assert drop.call == 1
        np.testing.assert_array_equal(drop.backward(self.x), y)
        np.testing.assert_array_equal(drop.mask, y != 0)
        assert drop.state_dict()["call"] == 2
        np.testing.assert_array_equal(drop.forward(self.x), masked(self.x, drop, 3))

    def test_a_forward_and_its_backward_have_the_same_settings(self) -> None:
        """Whenever they are assigned."""
        drop, x, y = xo.Dropout(0.25, seed=1), self.x, self.x

        def handler() -> None:
            drop.dropout_ratio, drop.inverted = 1 - drop.dropout_ratio, not drop.inverted

        def outer() -> None:
            nonlocal y
            y = drop.forward(x)

        def after() -> None:
            np.testing.assert_array_equal(drop.backward(x), y)
            np.testing.assert_array_equal(drop.mask, y != 0)

        assert at_each_bytecode(outer, handler, after) > 100

    def test_an_assignment_in_the_middle_is_not_lost(self) -> None:
        drop, number, ratio = xo.Dropout(0.5, seed=1), 0, 1.0

        def handler() -> None:
            nonlocal number
            number += 1
            drop.broadcast_axes = (number,)

        def outer() -> None:
            drop.dropout_ratio = ratio

        def after() -> None:
            nonlocal ratio
            assert (drop.dropout_ratio, drop.broadcast_axes) == (ratio, (number,) if number else ())
            ratio *= 0.99

        assert at_each_bytecode(outer, handler, after) > 10
        assert number > 10

    def test_a_value_changed_within_its_change(self) -> None:
        count, steps = Atomic(0), []

        def change() -> None:
            steps.append(count.change(lambda n: n + 1))

        places = at_each_bytecode(change, change)
        assert places > 20
        assert sorted(steps) == list(range(1, 2 * places + 2))
        assert count.get() == 2 * places + 1

    def test_a_change_that_raises_changes_nothing(self) -> None:
        count = Atomic(1)
        with pytest.raises(ZeroDivisionError):
            count.change(lambda n: n // 0)
        assert count.get() == 1

    def test_layers_within_the_making_of_a_layer(self) -> None:
        random.seed(3)
        made: list[xo.Dropout] = []
        places = at_each_bytecode(lambda: made.append(xo.Dropout()), lambda: made.append(xo.Dropout()))
        assert places > 30
        assert sorted(drop.layer for drop in made) == list(range(2 * places + 1))
        assert {drop.seed for drop in made} == {3}

    def test_a_seed_that_is_set_within_the_making_of_a_layer(self) -> None:
        random.seed(0)
        made: list[xo.Dropout] = []
        seeds = iter(range(1, 10_000))
        places = at_each_bytecode(lambda: made.append(xo.Dropout()), lambda: random.seed(next(seeds)))
        assert places > 30
        assert {drop.layer for drop in made} <= {0, 1}
        assert len({(drop.seed, drop.layer) for drop in made}) == len(made)


STORM = """
import signal, sys
import numpy as np
import xpoptim as xo

drop, x, outputs = xo.Dropout(0.5, seed=1), np.arange(1.0, 257.0), []
drop.forward(x)


def handler(*_):
    outputs.append(drop.forward(x))


signal.signal(signal.SIGALRM, handler)
delays = np.random.default_rng(0).uniform(1e-5, 2e-4, 2000)
for delay in delays:  # one signal at a time: the next could come within the handler of the one before, and so on
    signal.setitimer(signal.ITIMER_REAL, delay)
    for _ in range(3):
        outputs.append(drop.forward(x))
signal.setitimer(signal.ITIMER_REAL, 0)
expected = {xo.dropout(x, 0.5, seed=1, stream=call).tobytes() for call in range(2, 2 + len(outputs))}
print({y.tobytes() for y in outputs} == expected, len(outputs) > 3 * len(delays))
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_forwards_in_a_signal_handler() -> None:
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")


# --- Forks ------------------------------------------------------------------------------------------------

# A process of its own: one that holds torch or JAX may not fork.
FORK = """
import faulthandler, os, signal, sys, threading, time, warnings
import numpy as np
import xpoptim as xo

faulthandler.dump_traceback_later(100, exit=True)
warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, for a fork of a process with threads
drop, small, large = xo.Dropout(0.5, seed=1), np.ones(9), np.ones(300_000, np.float32)
xo.random.seed(5)
drop.forward(small)
stop = threading.Event()


def busy(index):
    while not stop.is_set():
        drop.forward(large if index == 0 else small)
        xo.Dropout()
        if index == 2:
            xo.random.seed(5)
            xo.random.seed(None)


def child():
    x = np.arange(1.0, 100.0)
    before = drop.state_dict()["call"]
    assert drop.call == 1  # the latest of the thread that forked
    y = drop.forward(x)
    assert drop.call == before + 1
    assert np.array_equal(y, xo.dropout(x, 0.5, seed=1, stream=before + 1))
    assert np.array_equal(drop.backward(x), y)
    xo.random.seed(6)
    assert [xo.Dropout().layer for _ in range(3)] == [0, 1, 2]
    xo.random.seed(None)
    xo.Dropout()


workers = [threading.Thread(target=busy, args=(index,), daemon=True) for index in range(3)]
for worker in workers:
    worker.start()
for _ in range(40):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(30)  # ends a child that hangs
            child()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
stop.set()
for worker in workers:
    worker.join(timeout=60)
print("done")
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_while_threads_run_forwards_and_make_layers() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240, check=False)
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr


FORK_IN_THE_MIDDLE = """
import os, signal, threading
import xpoptim as xo

urandom, asked, go = os.urandom, threading.Event(), threading.Event()


def slow(n):
    if threading.current_thread() is not threading.main_thread():
        asked.set()
        go.wait(30)
    return urandom(n)


os.urandom = slow
threading.Thread(target=xo.Dropout, daemon=True).start()
assert asked.wait(30)
pid = os.fork()
if pid == 0:
    signal.alarm(10)  # ends a child that hangs
    xo.random.seed(1)
    os._exit(0 if xo.Dropout().layer == 0 else 1)
print(os.waitpid(pid, 0)[1])
go.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_a_thread_asks_for_a_seed() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK_IN_THE_MIDDLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
