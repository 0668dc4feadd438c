"""Races, odd names, odd numbers: what careful readers tried against the core, each of which once went wrong."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import assert_same_bits, frozen_values, refused

import xpoptim as xo
from xpoptim import optimizer
from xpoptim.engines import reference


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def both(optimizer: Any, g: Any, p: Any = 1.0, steps: int = 3) -> tuple[np.ndarray, np.ndarray]:
    results = []
    for engine in ("fused", "reference"):
        opt, params = optimizer(), {"p": np.full(np.shape(g), p, np.asarray(g).dtype)}
        with xo.engine(engine):
            for _ in range(steps):
                opt.update(params, {"p": g})
        results.append(params["p"])
    return results[0], results[1]


class MinusZero(xo.Optimizer):
    @staticmethod
    def rule(xp, p, g):
        return xp.where(g > 0, p, -0.0)


class ScalarChoice(xo.Optimizer):
    lr: float = 0.1
    beta: float = 0.9

    @staticmethod
    def rule(xp, p, g, *, t, lr, beta):
        return p - lr * g / (2 - xp.minimum(beta, 0.5) ** t * xp.where(t > 1, 0.5, xp.sign(beta)))


class HugePower(xo.Optimizer):
    beta: float = 0.999999

    @staticmethod
    def rule(xp, p, g, *, t, beta):
        big = t * 1000000
        return p + g * beta ** (big * big * big * big) + beta ** (-big)


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", [MinusZero, ScalarChoice, HugePower])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars_and_constants_on_both_engines(optimizer: type, dtype: Any) -> None:
    fused, reference = both(optimizer, np.array([1.0, -1.0, 0.0], dtype))
    assert_same_bits(fused, reference)


def test_minus_zero_stays_negative() -> None:
    fused, _ = both(MinusZero, np.array([-1.0]))
    assert np.signbit(fused[0])


@pytest.mark.parametrize("name", ["norm", "t", "p", "update", "state", "slots", "fused", "rule"])
def test_taken_names_of_hyperparameters(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        type("Bad", (xo.Optimizer,), {"__annotations__": {name: float}, name: 0.5})


@pytest.mark.parametrize("slots", [("p",), ("g",), ("m", "m"), ("t",), ("a b",), ("lr",)])
def test_taken_names_of_slots(slots: tuple[str, ...]) -> None:
    with pytest.raises(TypeError):
        type("Bad", (xo.Optimizer,), {"__annotations__": {"lr": float}, "lr": 0.5, "slots": slots})


def test_slots_in_another_order_than_declared() -> None:
    with pytest.raises(TypeError, match="order"):

        class Swapped(xo.Optimizer):
            slots = ("m", "v")

            @staticmethod
            def rule(xp, p, g, v, m):
                return p, v, m


def test_names_that_a_code_generator_could_stumble_over() -> None:
    @staticmethod
    def rule(xp, p, g, float_, s, *, größe):
        return p - größe * g, float_ + g, s + g

    namespace = {"__annotations__": {"größe": float}, "größe": 0.5, "slots": ("float_", "s"), "rule": rule}
    odd = type('Odd"\n; name \\', (xo.Optimizer,), namespace)
    params = {"p": np.ones(3)}
    odd().update(params, {"p": np.ones(3)})
    assert (params["p"] == 0.5).all()
    odd().source("cuda").encode()


def test_none_only_where_it_switches_something_off() -> None:
    class Mine(xo.Optimizer):
        lr: float | None = None

        @staticmethod
        def rule(xp, p, g, *, lr):
            return p - lr * g

    with pytest.raises(TypeError, match="lr"):
        Mine()

    class Clipped(xo.SGD):
        clip_norm = 1.0

    opt = Clipped(clip_norm=None)
    assert opt.clip_norm is None
    opt.clip_norm = 2.0


def test_decoupled_needs_a_learning_rate_also_later() -> None:
    opt = MinusZero()
    with pytest.raises(TypeError, match="lr"):
        opt.decoupled = True


def test_repr_can_be_evaluated() -> None:
    for opt in (xo.AdamW(weight_decay=0.0), xo.AdamW(), xo.Adam(clip_norm=1.0, maximize=True)):
        again = eval(repr(opt), vars(xo))
        assert again.state_dict()["hyperparameters"] == opt.state_dict()["hyperparameters"]


@pytest.mark.parametrize("step", [-1, 2.5, float("nan"), True, "x", None])
def test_a_step_count_that_someone_spoilt(step: Any) -> None:
    opt, params = xo.Momentum(), {"p": np.ones(2)}
    for _ in range(2):
        opt.update(params, {"p": np.ones(2)})
    before = params["p"].copy()
    opt.state["step"] = step
    with pytest.raises(ValueError, match="step"):
        opt.update(params, {"p": np.ones(2)})
    assert (params["p"] == before).all()


@pytest.mark.parametrize("slots", [None, {"v": None}, {"v": {"p": None}}, {"v": {1: np.ones(2)}}, [], {"v": [1.0]}])
def test_a_state_dict_that_is_none(slots: Any) -> None:
    opt = xo.Momentum()
    opt.update({"p": np.ones(2)}, {"p": np.ones(2)})
    state = opt.state_dict() | {"slots": slots}
    before = copy.deepcopy(opt.state)
    with pytest.raises(ValueError, match=r"slot|state"):
        opt.load_state_dict(state)
    assert_same_bits(opt.state["slots"]["v"]["p"], before["slots"]["v"]["p"])


def test_a_state_without_slots_still_knows_its_parameters() -> None:
    opt = xo.SGD()
    opt.update({"p": np.ones(2)}, {"p": np.ones(2)})
    new = xo.SGD()
    new.load_state_dict(opt.state_dict())
    for params in ({"q": np.ones(2)}, {"p": np.ones(3)}, {"p": np.ones(2, np.float32)}):
        with refused(new, params, error=ValueError):
            new.update(params, {key: np.ones_like(value) for key, value in params.items()})
    new.update({"p": np.ones(2)}, {"p": np.ones(2)})
    other = xo.SGD()
    other.update({"p": np.ones(3)}, {"p": np.ones(3)})
    with pytest.raises(ValueError, match="'p' has shape"):
        other.load_state_dict(opt.state_dict())


def test_slots_may_start_at_minus_zero_or_too_large() -> None:
    class Starts(xo.Optimizer):
        slots = {"zero": -0.0, "large": 1e300}  # noqa: RUF012

        @staticmethod
        def rule(xp, p, g, zero, large):
            return p, zero, large

    opt = Starts()
    state = opt.init({"p": np.ones(2, np.float32)})
    assert np.signbit(state["slots"]["zero"]["p"]).all()
    assert np.isinf(state["slots"]["large"]["p"]).all()


def test_layers_without_parameters() -> None:
    params = {"relu": {}, "net": [{"W": np.ones(2)}, ()]}
    xo.SGD(lr=1.0).update(params, {"net": [{"W": np.ones(2)}, ()]})
    assert (params["net"][0]["W"] == 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize("nested", [False, True], ids=["in one call", "in steps"])
@pytest.mark.parametrize("made", [True, False], ids=["after the kernel", "before the kernel"])
def test_control_c_finds_the_step_counted_if_it_was_made(
    made: bool, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpoptim.engines.cpu import native
    from xpoptim.engines.cpu.plan import Plan
    from xpoptim.engines.cpu.watch import Direct, NativeWatch, PlainWatch

    def container(value: float) -> Any:
        return {"layer": {"p": np.full(2, value)}} if nested else {"p": np.full(2, value)}

    opt, params = xo.Adam(), container(1.0)
    opt.update(params, container(1.0))
    watch = PlainWatch if native.missing() else NativeWatch
    owner: Any = (Plan if made else watch) if nested or native.missing() else Direct
    name = "unchanged" if owner is watch else "run"
    original = getattr(owner, name)

    def interrupted(self: Any, *arguments: Any) -> Any:
        if made:
            original(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.update(params, container(1.0))
    assert opt.state["step"] == 1 + made


def test_a_bad_number_of_threads_in_the_environment_changes_nothing() -> None:
    done = run_python(
        """
        import numpy as np, xpoptim as xo
        params = {"a": np.zeros(3, np.float32), "b": np.zeros(300_000)}
        try:
            xo.SGD(lr=1.0).update(params, {"a": np.ones(3, np.float32), "b": np.ones(300_000)})
        except ValueError as error:
            assert "XPOPTIM_NUM_THREADS" in str(error)
            print(params["a"].sum(), params["b"].sum())
        """,
        XPOPTIM_NUM_THREADS="many",
    )
    assert done.stdout == "0.0 0.0\n", done.stderr


@pytest.mark.smoke
def test_first_steps_of_many_threads_at_once() -> None:
    for _ in range(3):
        done = run_python(
            """
            import threading
            import numpy as np, xpoptim as xo
            start, results = threading.Barrier(6), []
            def work():
                params = {"p": np.ones(100)}
                opt = xo.Adam()
                start.wait()
                for _ in range(20):
                    opt.update(params, {"p": np.ones(100)})
                results.append(params["p"].tobytes())
            threads = [threading.Thread(target=work) for _ in range(6)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            print(len(results), len(set(results)))
            """
        )
        assert done.stdout == "6 1\n", (done.returncode, done.stderr)


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_while_another_thread_compiles() -> None:
    done = run_python(
        """
        import os, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        import numpy as np, xpoptim as xo
        xo.Momentum().update({"p": np.ones(3)}, {"p": np.ones(3)})  # Python's own locks of imports are not ours
        def compile_many():
            for wd in range(1, 9):
                for cls in (xo.Adam, xo.AdaGrad, xo.RMSprop):
                    cls(clip_value=float(wd), maximize=wd % 2 == 0).update({"p": np.ones(3, "f4")}, {"p": np.ones(3)})
        thread = threading.Thread(target=compile_many)
        thread.start()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                params = {"p": np.ones(3)}
                xo.Nesterov().update(params, {"p": np.ones(3)})
                os._exit(0 if (params["p"] < 1).all() else 1)
            assert os.waitpid(pid, 0)[1] == 0
        thread.join()
        print("fine")
        """
    )
    assert done.stdout == "fine\n", done.stderr


LATE = """
import atexit, sys, threading
import numpy as np, xpoptim as xo
xo.set_num_threads(2)
def late():
    params = {"p": np.zeros(600_000)}
    opt = xo.SGD(lr=1.0)
    for _ in range(3):
        opt.update(params, {"p": np.ones(600_000)})
    kept = xo.Dropout(0.5, inverted=True).forward(np.ones(1_000_000)) != 0
    print((params["p"] == -3).all(), 0.4 < kept.mean() < 0.6)
def outlive():
    threading.main_thread().join()
    late()
"""


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("when", "times"),
    [
        ("atexit.register(late)", 1),
        ("late(); atexit.register(late)", 2),
        ("atexit.register(late); sys.exit()", 1),
        ("threading.Thread(target=outlive).start()", 1),
    ],
    ids=["at exit", "before and at exit", "at exit, by an exception", "in a thread that outlives the main one"],
)
def test_steps_when_the_interpreter_shuts_down(when: str, times: int) -> None:
    """From Python 3.12 on no thread can be started then: a step makes do with those that there are."""
    done = run_python(LATE + when)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n" * times, "")


@pytest.mark.smoke
def test_at_exit_a_compilation_in_a_daemon_thread_is_waited_for() -> None:
    """LLVM must not be at work when the process takes its libraries down: it would crash now and then."""
    done = run_python(
        """
        import threading, time
        import numpy as np, xpoptim as xo
        from xpoptim.engines.cpu import jit
        create, begun = jit.llvm.create_mcjit_compiler, threading.Event()
        def slow(*arguments):
            print("begun")
            begun.set()
            time.sleep(0.3)
            engine = create(*arguments)
            print("done", flush=True)
            return engine
        jit.llvm.create_mcjit_compiler = slow
        step = lambda: xo.SGD().update({"p": np.ones(3)}, {"p": np.ones(3)})
        threading.Thread(target=step, daemon=True).start()
        begun.wait()
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "begun\ndone\n" * done.stdout.count("begun")


def test_subnormals_are_kept_whatever_the_mode_of_a_thread() -> None:
    pytest.importorskip("torch", reason="torch, which switches the mode, is not installed")
    done = run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import numpy as np, torch, xpoptim as xo
        params = {"p": np.zeros(2_000_000, np.float32)}
        grads = {"p": np.full(2_000_000, 1e-40, np.float32)}
        want = params["p"] - np.float32(0.5) * grads["p"]
        torch.set_flush_denormal(True)
        xo.set_num_threads(2)
        opt = xo.SGD(lr=0.5)
        opt.update(params, grads)
        torch.set_flush_denormal(False)
        print(np.array_equal(params["p"].view(np.int32), want.view(np.int32)))
        """
    )
    assert done.stdout == "True\n", done.stderr


def test_read_only_memory_of_other_libraries() -> None:
    strict = pytest.importorskip("array_api_strict")
    frozen = np.ones(2)
    frozen.flags.writeable = False
    params = {"a": np.ones(2), "b": strict.asarray(frozen, copy=False)}
    opt = xo.SGD()
    with refused(opt, error=ValueError, names="b read-only"):
        opt.update(params, {"a": np.ones(2), "b": strict.ones(2)})
    assert (params["a"] == 1).all()


def test_expanded_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    opt, params = xo.SGD(), {"a": np.ones(2), "b": torch.ones(1).expand(4)}
    with refused(opt, error=ValueError, names="b share"):
        opt.update(params, {"a": np.ones(2), "b": torch.ones(4)})
    assert (params["a"] == 1).all()


def test_an_optimizer_of_jax_arrays_pickles() -> None:
    jnp = pytest.importorskip("jax.numpy")
    opt, params = xo.Momentum(), {"p": jnp.ones(2)}
    opt.update(params, {"p": jnp.ones(2)})
    for again in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), copy.copy(opt)):
        again.update(dict(params), {"p": jnp.ones(2)})
        assert again.state["step"] == 2


SIGNALS = """
import signal, sys, time
import numpy as np, xpoptim as xo

class Interrupt(Exception):
    pass

def handler(signum, frame):
    raise Interrupt

signal.signal(signal.SIGALRM, handler)
xo.set_num_threads(2)
kind, size, seconds = sys.argv[1], int(sys.argv[2]), 1.5
p, one = np.zeros(size, np.float32), np.ones(size, np.float32)
options, params, grads = {}, {"p": p}, {"p": one}
if kind == "nested":
    params, grads = {"layer": params}, {"layer": grads}
elif kind == "schedule":
    options["lr"] = lambda step: 1.0
elif kind == "clip_norm":
    options["clip_norm"] = 1e9
elif kind == "two dtypes":
    params["q"], grads["q"] = np.zeros(3), np.ones(3)
elif kind == "full":
    params["q"], grads["q"] = np.zeros(6)[::2], np.ones(3)
opt = xo.SGD(**{"lr": 1.0, **options})
# What a handler raises during an import may be lost: from Python 3.12 on the import system has callbacks of weakrefs.
for _ in range(3):
    opt.update(params, grads)
end, wrong, interrupts = time.monotonic() + seconds, 0, 0
while time.monotonic() < end:
    before, start = opt.state["step"], p.copy()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-4 * np.random.rand())
        while True:
            opt.update(params, grads)
    except Interrupt:
        interrupts += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    steps = opt.state["step"] - before
    wrong += not (p == start - steps).all()
    if kind == "two dtypes":
        wrong += not (params["q"] == p[0]).all()
    if p[0] < -1e6:
        p[:] = 0
        if "q" in params:
            params["q"][:] = 0
print(wrong, interrupts > 50)
"""
KINDS = ["flat", "nested", "schedule", "clip_norm", "two dtypes", "full"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, 4) for kind in KINDS),
        pytest.param("flat", 200_000, marks=pytest.mark.smoke),
        pytest.param("nested", 600_000, marks=pytest.mark.smoke),
    ],
)
def test_steps_are_counted_whatever_a_signal_handler_raises(kind: str, size: int) -> None:
    """At any bytecode: in the quick path, in the engine, while helpers are made or at work."""
    command = [sys.executable, "-c", SIGNALS, kind, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "0 True\n"), done.stderr


@pytest.mark.smoke
def test_what_a_signal_handler_assigns_is_not_lost() -> None:
    """An assignment in the middle of a step counts from the next step on, whatever the step had read by then."""
    opt, params, grads = xo.Momentum(lr=1.0, momentum=0.0), [np.zeros(3)], [np.ones(3)]
    for _ in range(3):
        opt.update(params, grads)
    assigned = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        """As if a handler ran right after the hyperparameters were read."""
        if frame.f_code is xo.Optimizer._derive.__code__ and "values" in frame.f_locals and not assigned:
            assigned.append(2.0)
            opt.lr = 2.0
        return trace

    opt.momentum = 0.0  # what was derived is outdated
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        opt.update(params, grads)
    finally:
        sys.settrace(before)
    assert assigned
    home = params[0].copy()
    opt.update(params, grads)
    assert (home - params[0] == 2.0).all()


class Interrupt(Exception):
    """Of a handler's own: of no kind that an optimizer might look for."""


def interrupting(signum: int, frame: Any) -> None:
    raise Interrupt


class Interrupting:
    def __call__(self, signum: int, frame: Any) -> None:
        raise Interrupt

    def method(self, signum: int, frame: Any) -> None:
        raise Interrupt


@pytest.mark.parametrize(
    "handler", [interrupting, Interrupting(), Interrupting().method], ids=["function", "object", "method"]
)
@pytest.mark.parametrize("traced", [True, False])
def test_what_a_signal_handler_raises_within_a_rule_is_no_error_of_the_rule(handler: Any, traced: bool) -> None:
    class Slow(xo.Optimizer):
        fused = traced

        @staticmethod
        def rule(xp: Any, p: Any, g: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return p - g

    before = signal.signal(signal.SIGINT, handler)
    opt, params = Slow(), {"p": np.ones(3)}
    try:
        with refused(opt, params, error=Interrupt):
            opt.update(params, {"p": np.ones(3)})
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_rule_raises_in_a_handlers_words_is_its_own() -> None:
    class Wrong(xo.Optimizer):
        @staticmethod
        def rule(xp: Any, p: Any, g: Any) -> Any:
            raise Interrupt

    with pytest.raises(xo.TraceError, match=r"Wrong\.rule could not be traced: Interrupt"):
        Wrong().update({"p": np.ones(3)}, {"p": np.ones(3)})


@pytest.mark.parametrize("where", ["before", "within"])
def test_an_optimizer_that_was_never_finished_goes_in_silence(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or an error in a subclass, while it is made: that is all that is reported."""

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if where == "before":
            object.__new__(xo.SGD)
        raise KeyboardInterrupt

    class Mine(xo.SGD):
        __new__ = interrupt

    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    monkeypatch.setattr(optimizer, "Stepper", interrupt)
    with pytest.raises(KeyboardInterrupt):
        (Mine if where == "before" else xo.SGD)()
    gc.collect()
    assert not unraisable


class Halved(xo.Optimizer):
    """A plain rule."""

    lr: float = 0.5
    slots = ("s",)
    fused = False

    @staticmethod
    def rule(xp, p, g, s, *, lr):
        return p - lr * g, s + g


def picture(params: Any, opt: xo.Optimizer) -> Any:
    def host(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: host(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [host(value) for value in tree]
        return np.asarray(tree) if hasattr(tree, "shape") else tree

    return frozen_values(host([params, dict(opt.state)]))


def interrupted_at_each_call(make: Any) -> int:
    """Steps that a signal handler interrupts, at the beginning of one function of the package: a later one each time.

    Such a step is either not made and not counted, or made and counted. Returns how many there were.
    """
    home = os.path.dirname(xo.__file__)
    for place in itertools.count():
        opt, params, grads = make()
        opt.update(params, grads)
        expected, expected_params, _ = make()
        expected.update(expected_params, grads)
        states = [picture(expected_params, expected)]
        expected.update(expected_params, grads)
        states.append(picture(expected_params, expected))
        left = place

        def trace(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            # Not of a generator, which is entered also to be closed, where nothing can be raised.
            ordinary = not frame.f_code.co_flags & inspect.CO_GENERATOR
            if event == "call" and ordinary and frame.f_code.co_filename.startswith(home):
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            opt.update(params, grads)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert picture(params, opt) in states, place
        if left >= 0:
            return place
    raise AssertionError


def _strided() -> Any:
    wide = np.ones((3, 8))
    return xo.Momentum(lr=0.5), {"a": wide[:, ::2], "b": wide[:, 1::2]}, {"a": np.ones((3, 4)), "b": np.ones((3, 4))}


def _plain() -> Any:
    return Halved(), {"a": np.ones(3), "b": 2.0, "c": [1.0]}, {"a": np.ones(3), "b": 1.0, "c": [1.0]}


def _dense() -> Any:
    return xo.Momentum(), {"a": np.ones(3), "b": 2.0, "c": [1.0]}, {"a": np.ones(3), "b": 1.0, "c": [1.0]}


def _strict() -> Any:
    strict = pytest.importorskip("array_api_strict")
    params = {"a": np.ones(3), "b": strict.ones(3), "c": strict.ones(2)}
    return xo.Momentum(), params, {"a": np.ones(3), "b": strict.ones(3), "c": strict.ones(2)}


def _jax() -> Any:
    jnp = pytest.importorskip("jax.numpy")
    params = {"a": np.ones(3), "b": jnp.ones(3), "c": jnp.ones(2)}
    return xo.Momentum(), params, {"a": np.ones(3), "b": jnp.ones(3), "c": jnp.ones(2)}


@pytest.mark.parametrize("make", [_strided, _plain, _dense, _strict, _jax])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_no_step_is_half_made_though_a_signal_handler_raises(make: Any, engine: str) -> None:
    with xo.engine(engine):
        assert interrupted_at_each_call(make) > 10


def test_a_library_that_raises_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has kernels is written behind what has none, and may raise."""
    strict = pytest.importorskip("array_api_strict")
    params, opt = {"a": np.ones(3), "b": strict.ones(3)}, xo.SGD(lr=0.5)
    grads = {"a": np.ones(3), "b": strict.ones(3)}
    opt.update(params, grads)
    monkeypatch.setattr(reference, "_computed", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        opt.update(params, grads)
    assert params["a"].tolist() == [0.5] * 3
    assert opt.state["step"] == 1
